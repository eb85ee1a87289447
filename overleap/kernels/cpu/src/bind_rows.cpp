// What ../rows.py, ../streams.py and ../sequences.py call; and the two ops that only copy bytes.
#include "bind.h"

#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>

#include "buffer.h"
#include "rows.h"

namespace overleap {

void window_write(Address ring, int64_t capacity, int64_t bytes, Address rows,
                  Sequences* sequences) {
    const auto& [start, count, slot] = *sequences;
    const uint8_t* row = at<uint8_t>(rows);
    for (size_t b = 0; b < start.size(); b++) {
        uint8_t* own = at<uint8_t>(ring) + slot[b] * capacity * bytes;
        for (int64_t t = count[b] > capacity ? count[b] - capacity : 0; t < count[b]; t++)
            std::memcpy(own + (start[b] + t) % capacity * bytes, row + t * bytes, bytes);
        row += count[b] * bytes;
    }
}

namespace {

Rows rows(Address x, int type, int64_t count, int64_t heads, int64_t width, Address out,
          int threads) {
    return {at<void>(x), static_cast<Float>(type), count, heads, width, at<void>(out), threads};
}

Norm norm(Address weight, int type, float eps) {
    return {at<void>(weight), static_cast<Float>(type), eps};
}

Turn turn(Address position, Address frequency, int64_t rotary, bool inverse) {
    return {at<int64_t>(position), at<float>(frequency), rotary, inverse};
}

// bf16 or f32 values as f32.
void widened(const uint8_t* from, int type, int64_t count, float* to) {
    if (type == static_cast<int>(Float::f32)) {
        std::memcpy(to, from, 4 * static_cast<size_t>(count));
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t half;
        std::memcpy(&half, from + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(to + i, &bits, 4);
    }
}

void bind_norms(nanobind::module_& m) {
    op(
        m, "rms_norm",
        +[](Address x, int type, int64_t count, int64_t width, Address weight, int weight_type,
           float eps, Address out, int threads) {
            Rows r = rows(x, type, count, 1, width, out, threads);
            OVERLEAP_CALL(rms_norm)(r, norm(weight, weight_type, eps));
        });
    op(
        m, "norm_rope",
        +[](Address x, int type, int64_t count, int64_t heads, int64_t width, Address weight,
           int weight_type, float eps, Address position, Address frequency, int64_t rotary,
           Address out, int threads) {
            Rows r = rows(x, type, count, heads, width, out, threads);
            Turn t = turn(position, frequency, rotary, false);
            OVERLEAP_CALL(norm_rope)(r, norm(weight, weight_type, eps), t);
        });
    op(
        m, "rotate",
        +[](Address x, int type, int64_t count, int64_t heads, int64_t width, Address position,
           Address frequency, int64_t rotary, bool inverse, Address out, int threads) {
            Rows r = rows(x, type, count, heads, width, out, threads);
            OVERLEAP_CALL(rotate)(r, turn(position, frequency, rotary, inverse));
        });
    op(
        m, "hadamard",
        +[](Address x, int type, int64_t count, int64_t width, Address out, int threads) {
            OVERLEAP_CALL(hadamard)(rows(x, type, count, 1, width, out, threads));
        });
    op(
        m, "quantize",
        +[](Address x, int type, int64_t count, int64_t width, bool key, int64_t rotary,
           int64_t bytes, Address out, int threads) {
            Rows r = rows(x, type, count, 1, width, out, threads);
            OVERLEAP_CALL(quantize)(r, Packing{key, rotary, bytes});
        });
    op(m, "norm_rope_quantize", call_norm_rope_quantize);
    op(
        m, "route",
        +[](Address x, int type, int64_t tokens, int64_t width, Address gate, int form,
           Address bias, Address fixed, int64_t experts, int64_t k, float scale, Address ids,
           Address weight, int threads) {
            RawBuffer<float> logit;
            logit.resize(tokens * experts);
            const Stored rows{at<void>(gate), nullptr, static_cast<Form>(form), experts, width};
            OVERLEAP_CALL(product)(Product{at<void>(x), static_cast<Float>(type), tokens, 1, width,
                                           nullptr, Float::f32, 0,
                                           {{rows, false, logit.data(), Float::f32, experts}},
                                           threads});
            Routing r{logit.data(), at<float>(bias), at<int64_t>(fixed), tokens, experts, k,
                      scale, at<int64_t>(ids), at<float>(weight), threads};
            OVERLEAP_CALL(route)(r);
        });
}

void bind_streams(nanobind::module_& m) {
    op(
        m, "collapse",
        +[](Address x, int type, int64_t tokens, int64_t streams, int64_t width, Address fn,
           Address base, Address scale, int64_t iterations, float eps, float norm_eps, Address y,
           Address post, Address comb, Address norm_weight, int norm_type, int threads) {
            Collapse c{at<void>(x), static_cast<Float>(type), tokens, streams, width,
                       at<float>(fn), at<float>(base), at<float>(scale), iterations, eps,
                       norm_eps, at<void>(y), at<float>(post), at<float>(comb), threads};
            OVERLEAP_CALL(collapse)(c);
            if (!norm_weight) return;
            Rows r = rows(y, type, tokens, 1, width, y, threads);
            OVERLEAP_CALL(rms_norm)(r, norm(norm_weight, norm_type, norm_eps));
        });
    op(
        m, "spread",
        +[](Address y, Address x, int type, int64_t tokens, int64_t streams, int64_t width,
           Address post, Address comb, Address out, int threads) {
            Spread s{at<void>(y), at<void>(x), static_cast<Float>(type), tokens, streams, width,
                     at<float>(post), at<float>(comb), at<void>(out), threads};
            OVERLEAP_CALL(spread)(s);
        });
}

void page_write(Address pool, int64_t per_page, int64_t bytes, Address rows, Address table,
                int64_t table_width, int64_t ratio, Sequences* sequences) {
    const auto& [start, count, slot] = *sequences;
    const uint8_t* row = at<uint8_t>(rows);
    for (size_t b = 0; b < start.size(); b++) {
        const int64_t* page = at<int64_t>(table) + static_cast<int64_t>(b) * table_width;
        const int64_t last = (start[b] + count[b]) / ratio;
        for (int64_t e = start[b] / ratio; e < last; e++, row += bytes) {
            int64_t to = page[e / per_page] * per_page + e % per_page;
            std::memcpy(at<uint8_t>(pool) + to * bytes, row, bytes);
        }
    }
}

void bind_sequences(nanobind::module_& m) {
    op(m, "window_write", window_write);
    op(m, "page_write", page_write);
    op(
        m, "compress",
        +[](Address fresh, Address tail, Address ape, int64_t width, int64_t capacity,
           int64_t ratio, bool overlapped, bool writes, Sequences* sequences, Address out,
           int threads) {
            Pooling p{at<float>(fresh), at<float>(tail), at<float>(ape), width, capacity, ratio,
                      overlapped, *sequences, at<float>(out), threads};
            OVERLEAP_CALL(compress)(p);
            if (writes) window_write(tail, capacity, 8 * width, fresh, sequences);
        });
}

}  // namespace

void call_norm_rope_quantize(Address x, int type, int64_t count, int64_t heads, int64_t width,
                             bool normed, Address weight, int weight_type, float eps,
                             Address position, Address frequency, int64_t rotary, bool mixed,
                             bool packed, bool key, int64_t rope, int64_t bytes, Address out,
                             int threads) {
    const auto size = static_cast<size_t>(type == static_cast<int>(Float::bf16) ? 2 : 4);
    std::unique_ptr<uint8_t[]> made(new uint8_t[static_cast<size_t>(count * width) * size]);
    const auto between = reinterpret_cast<Address>(made.get());
    const Turn t = turn(position, frequency, rotary, false);
    Rows r = rows(x, type, count, heads, width, between, threads);
    if (normed) OVERLEAP_CALL(norm_rope)(r, norm(weight, weight_type, eps), t);
    else OVERLEAP_CALL(rotate)(r, t);
    r = rows(between, type, count, 1, width, between, threads);
    if (mixed) OVERLEAP_CALL(hadamard)(r);
    r.out = at<void>(out);
    if (packed) OVERLEAP_CALL(quantize)(r, Packing{key, rope, bytes});
    else widened(made.get(), type, count * width, at<float>(out));
}

void bind_rows(nanobind::module_& m) {
    bind_norms(m);
    bind_streams(m);
    bind_sequences(m);
}

}  // namespace overleap
