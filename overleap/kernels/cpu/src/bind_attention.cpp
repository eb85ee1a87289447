// Bindings of index_topk and attend; ../attention.py has checked shapes and dtypes.
#include "bind.h"

#include <nanobind/stl/vector.h>

#include "attention.h"
#include "buffer.h"
#include "rows.h"

namespace overleap {
namespace {

std::vector<Stretch> stretches(const Sequences& sequences) {
    const auto& [start, count, slot] = sequences;
    std::vector<Stretch> found(start.size());
    int64_t first = 0;
    for (size_t b = 0; b < start.size(); b++) {
        found[b] = {start[b], count[b], first, slot[b]};
        first += count[b];
    }
    return found;
}

RowLayout layout(int kind, int64_t width, int64_t rope, int64_t bytes) {
    return {static_cast<RowKind>(kind), width, rope, bytes};
}

// What meets one input: tables and sizes of the parts, and where results go.
struct Input {
    std::vector<Address> tables, out;
    std::vector<int> counts, types;
};

void call_inputs(Address x, int type, int64_t tokens, int64_t columns, const Input& of_input,
                 int64_t rank, const Input& of_latent, Address q_norm, int q_norm_type,
                 Address kv_norm, int kv_norm_type, float eps, int64_t heads, int64_t width,
                 Address position, Address frequency, int64_t rotary, bool packed, int64_t rope,
                 int64_t bytes, Address fresh, int threads) {
    const int64_t size = type == static_cast<int>(Float::bf16) ? 2 : 4;
    RawBuffer<uint8_t> own;  // the query latent, and the rows before they are packed
    own.resize(tokens * (rank + width) * size);
    const auto latent = reinterpret_cast<Address>(own.data());
    const Address row = latent + static_cast<Address>(tokens * rank * size);
    std::vector<Address> out{latent, row};
    out.insert(out.end(), of_input.out.begin(), of_input.out.end());
    call_project(x, type, tokens, columns, 0, 0, 0, of_input.tables, of_input.counts, out,
                 of_input.types, threads);
    call_project(latent, type, tokens, rank, q_norm, q_norm_type, eps, of_latent.tables,
                 of_latent.counts, of_latent.out, of_latent.types, threads);
    const Address q = of_latent.out[0];
    Rows queries{at<void>(q), static_cast<Float>(type), tokens * heads, heads, width, at<void>(q),
                 threads};
    OVERLEAP_CALL(norm_rope)(queries, Norm{nullptr, Float::f32, eps},
                             Turn{at<int64_t>(position), at<float>(frequency), rotary, false});
    call_norm_rope_quantize(row, type, tokens, 1, width, true, kv_norm, kv_norm_type, eps, position,
                            frequency, rotary, false, packed, false, rope, bytes, fresh, threads);
}

}  // namespace

void bind_attention(nanobind::module_& m) {
    op(
        m, "attention_inputs",
        +[](Address x, int type, int64_t tokens, int64_t columns, std::vector<Address> in_tables,
           std::vector<int> in_counts, std::vector<Address> in_out, std::vector<int> in_types,
           int64_t rank, std::vector<Address> latent_tables, std::vector<int> latent_counts,
           std::vector<Address> latent_out, std::vector<int> latent_types, Address q_norm,
           int q_norm_type, Address kv_norm, int kv_norm_type, float eps, int64_t heads,
           int64_t width, Address position, Address frequency, int64_t rotary, bool packed,
           int64_t rope, int64_t bytes, Address fresh, int threads) {
            call_inputs(x, type, tokens, columns, {in_tables, in_out, in_counts, in_types}, rank,
                        {latent_tables, latent_out, latent_counts, latent_types}, q_norm,
                        q_norm_type, kv_norm, kv_norm_type, eps, heads, width, position, frequency,
                        rotary, packed, rope, bytes, fresh, threads);
        });
    op(
        m, "index_topk",
        +[](Address q, Address weight, int64_t heads, Address keys, int kind, int64_t width,
           int64_t bytes, int64_t per_page, Address table, int64_t table_width, int64_t ratio,
           int64_t k, Sequences* sequences, Address out, int threads) {
            Pages pages{at<const uint8_t>(keys), layout(kind, width, 0, bytes), per_page,
                        at<const int64_t>(table), table_width};
            Choice choice{at<const uint8_t>(q), at<const float>(weight), heads, pages, ratio, k,
                          stretches(*sequences), at<int64_t>(out), threads};
            OVERLEAP_CALL(choose)(choice);
        });
    op(
        m, "attend",
        +[](Address q, bool half, int64_t heads, Address fresh, Address ring, int64_t ring_rows,
           int kind, int64_t width, int64_t rope, int64_t bytes, Address entries, int64_t per_page,
           Address table, int64_t table_width, Address chosen, int64_t k, int64_t ratio,
           Address sink, float scale, int64_t window, Sequences* sequences, Address out,
           Address log, Address frequency, int64_t rotary, Address position, int threads) {
            RowLayout rows = layout(kind, width, rope, bytes);
            Pages pages{at<const uint8_t>(entries), rows, per_page, at<const int64_t>(table),
                        table_width};
            Attention attention{at<const void>(q), half ? Float::bf16 : Float::f32, heads, width,
                                at<const uint8_t>(fresh), at<const uint8_t>(ring), ring_rows, rows,
                                pages, at<const int64_t>(chosen), k, ratio, at<const float>(sink),
                                scale, window, stretches(*sequences), at<void>(out),
                                at<float>(log), threads};
            OVERLEAP_CALL(attend)(attention);
            if (!frequency) return;
            const Stretch& last = attention.sequences.back();
            const int64_t tokens = last.first + last.count;
            Rows turned{at<void>(out), attention.type, tokens * heads, heads, width, at<void>(out),
                        threads};
            OVERLEAP_CALL(rotate)(turned, Turn{at<int64_t>(position), at<float>(frequency), rotary, true});
            window_write(ring, ring_rows, bytes, fresh, sequences);
        });
}

}  // namespace overleap
