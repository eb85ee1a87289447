// attend: tiles of stored rows, decoded once for a block of tokens, under a running softmax.
// A token's rows come in one order, in tiles and parts cut at fixed places: window rows at absolute
// positions are part 0, entries follow at their rank among those the token attends to. Parts are
// summed apart and joined in order, by one thread or by several. So neither the block, nor the call,
// nor the threads show in the result, and all visible entries, named one by one, give the bits of
// "every visible entry". Read next: softmax.h, attend_tile.h.
#include <algorithm>
#include <iterator>

#include "softmax.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int64_t kPartRows = 8 * kTileRows;  // entries of a part
constexpr int64_t kWave = 16;                 // parts that are kept until they are joined
constexpr int64_t kBlockValues = 1 << 15;     // results of a block of tokens: an eighth of a small L2
constexpr int64_t kMostTokens = 32;
constexpr int64_t kLeastHeads = 8;            // of a thread's share, where threads share a part
constexpr int64_t kJoinedQueries = 8;         // the least that a thread joins
constexpr int64_t kAhead = 8;                 // rows that are fetched before they are needed

// Tokens of one sequence, and some heads of them.
struct Block {
    const Stretch* sequence;
    int64_t number;  // of the sequence
    int64_t offset, tokens;
    int64_t head, heads;

    int64_t queries() const { return tokens * heads; }
    int64_t position() const { return sequence->start + offset; }

    // The row of q and out that query r belongs to.
    int64_t packed(int64_t r, int64_t all_heads) const {
        return (sequence->first + offset + r / heads) * all_heads + head + r % heads;
    }
};

int64_t parts_of(const Attention& a, const Block& block) {
    if (!a.entries.rows) return 1;
    int64_t entries = a.chosen ? a.k : (block.position() + block.tokens) / a.ratio;
    return 1 + (entries + kPartRows - 1) / kPartRows;
}

// Ascending; few numbers of a small range are marks in a row of bits.
void sort_numbers(std::vector<int64_t>& numbers) {
    constexpr int64_t range = 1 << 16;
    uint64_t marks[range / 64];
    int64_t most = -1;
    for (int64_t n : numbers) most = std::max(most, n);
    if (most >= range) return std::sort(numbers.begin(), numbers.end());
    std::fill(marks, marks + most / 64 + 1, 0);
    bool twice = false;
    for (int64_t n : numbers) {
        twice |= marks[n / 64] >> n % 64 & 1;
        marks[n / 64] |= uint64_t{1} << n % 64;
    }
    if (twice) return std::sort(numbers.begin(), numbers.end());
    auto to = numbers.begin();
    for (int64_t word = 0; word <= most / 64; word++)
        for (uint64_t left = marks[word]; left; left &= left - 1)
            *to++ = 64 * word + __builtin_ctzll(left);
}

// -- Rows of a part. X: queries and results; E: rows and queries in a product.

template <class X, class E>
class Rows {
  public:
    void start(const Attention& a, const Block& block) {
        a_ = &a, block_ = block, width_ = Tile<E>::padded(a.width), sorted_ = -1;
        softmax_.shape(block.heads, a.width, a.scale);
        query_.resize(block.queries() * width_);
        for (int64_t r = 0; r < block.queries(); r++) {
            const X* q = static_cast<const X*>(a.q) + block.packed(r, a.heads) * a.width;
            E* to = query_.data() + r * width_;
            int64_t k = 0;
            for (; k + W <= a.width; k += W) copy_vector(q + k, to + k);
            for (; k < a.width; k++) keep(to[k], number(q[k]));
            for (; k < width_; k++) to[k] = E{};
        }
    }

    // Adds part `number` of tokens first .. last - 1 of the block to sums of those.
    void part(int64_t number, int64_t first, int64_t last, Sums& sums) {
        first_ = first, last_ = last, sums_ = &sums;
        int64_t low = (number - 1) * kPartRows;
        if (number == 0) window();
        else if (!a_->chosen) visible(low);
        else
            for (int64_t t = first; t < last; t++) chosen(t, low);
    }

  private:
    void add(int64_t token, int64_t begin, int64_t end) {
        if (begin >= end) return;
        softmax_.add(query_.data() + token * block_.heads * width_, (token - first_) * block_.heads,
                     static_cast<int>(begin), static_cast<int>(end), *sums_);
    }

    void window() {
        const Attention& a = *a_;
        const Stretch& s = *block_.sequence;
        int64_t begin = block_.position() + first_, end = block_.position() + last_;
        int64_t low = std::max<int64_t>(0, begin - a.window + 1);
        for (int64_t tile = low / kTileRows * kTileRows; tile < end; tile += kTileRows) {
            int64_t from = std::max(low, tile), past = std::min(end, tile + kTileRows);
            for (int64_t p = from; p < past; p++) {
                int64_t fresh = s.first + p - s.start;
                int64_t old = s.slot * a.ring_rows + p % a.ring_rows;
                softmax_.tile.put(static_cast<int>(p - tile),
                                  p < s.start ? a.ring + old * a.layout.bytes
                                              : a.fresh + fresh * a.layout.bytes,
                                  a.layout);
            }
            softmax_.tile.ready(static_cast<int>(from - tile), static_cast<int>(past - tile));
            for (int64_t t = first_; t < last_; t++) {
                int64_t own = block_.position() + t;
                add(t, std::max(tile, own - a.window + 1) - tile, std::min(past, own + 1) - tile);
            }
        }
    }

    void visible(int64_t low) {
        int64_t begin = block_.position();
        int64_t count = std::min((begin + last_) / a_->ratio, low + kPartRows);
        for (int64_t tile = low; tile < count; tile += kTileRows) {
            int64_t past = std::min(count, tile + kTileRows);
            rows_.clear();
            for (int64_t n = tile; n < past; n++)
                rows_.push_back(a_->entries.entry(block_.number, n));
            fill(0, past - tile);
            for (int64_t t = first_; t < last_; t++)
                add(t, 0, std::min(past, (begin + t + 1) / a_->ratio) - tile);
        }
    }

    void chosen(int64_t token, int64_t low) {
        if (sorted_ != token) sort(token);
        int64_t count = std::min(static_cast<int64_t>(rows_.size()), low + kPartRows);
        for (int64_t tile = low; tile < count; tile += kTileRows) {
            int64_t many = std::min<int64_t>(kTileRows, count - tile);
            fill(tile, many);
            add(token, 0, many);
        }
    }

    // Addresses of what one token has chosen, in the order of the entries.
    void sort(int64_t token) {
        const int64_t* from = a_->chosen + (block_.sequence->first + block_.offset + token) * a_->k;
        numbers_.clear();
        std::copy_if(from, from + a_->k, std::back_inserter(numbers_),
                     [](int64_t n) { return n >= 0; });
        sort_numbers(numbers_);
        rows_.clear();
        for (int64_t n : numbers_) rows_.push_back(a_->entries.entry(block_.number, n));
        sorted_ = token;
    }

    void fill(int64_t from, int64_t count) {
        const int64_t all_rows = static_cast<int64_t>(rows_.size());
        for (int64_t n = 0; n < count; n++) {
            if (from + n + kAhead < all_rows)
                for (int64_t i = 0; i < a_->layout.bytes; i += 64)
                    __builtin_prefetch(rows_[from + n + kAhead] + i);
            softmax_.tile.put(static_cast<int>(n), rows_[from + n], a_->entries.layout);
        }
        softmax_.tile.ready(0, static_cast<int>(count));
    }

    const Attention* a_ = nullptr;
    Block block_{};
    int64_t width_ = 0, sorted_ = -1;  // the token that rows_ belongs to
    int64_t first_ = 0, last_ = 0;
    Sums* sums_ = nullptr;
    Softmax<E> softmax_;
    Buffer<E> query_;  // [tokens, heads, width]
    std::vector<int64_t> numbers_;
    std::vector<const uint8_t*> rows_;
};

// Results and log denominators of queries begin .. end - 1, with the sink in the denominator.
template <class X>
void finish(
    const Attention& a, const Block& block, const Sums& sums, int64_t width, int64_t begin,
    int64_t end) {
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = block.packed(r, a.heads);
        float above = a.sink[block.head + r % block.heads] - sums.top[r];
        float over = std::max(above, 0.0f);  // a sink far above every score must not overflow
        float under = exp_below(all(-over))[0];
        float total = sums.total[r] * under + exp_below(all(above - over))[0];
        a.log[row] = sums.top[r] + over + std::log(total);
        X* out = static_cast<X*>(a.out) + row * a.width;
        const float* mixed = sums.mixed.data() + r * width;
        const float share = under / total;
        int64_t i = 0;
        for (; i + W <= a.width; i += W) store(out + i, load(mixed + i) * share);
        for (; i < a.width; i++) keep(out[i], mixed[i] * share);
    }
}

// -- A block by one thread, or by all of them.

template <class X, class E>
struct Room {
    Rows<X, E> rows;
    Sums sums, part;
    std::vector<Sums> parts;  // of a block that is shared
};

// Opaque to the compiler, which would look the thread's address up again for every use.
template <class X, class E>
[[gnu::noipa]] Room<X, E>& room() {
    static thread_local Room<X, E> mine;
    return mine;
}

template <class X, class E>
void attend_block(const Attention& a, const Block& block) {
    Room<X, E>& my = room<X, E>();
    Rows<X, E>& rows = my.rows;
    Sums &sums = my.sums, &part = my.part;
    const int64_t width = Tile<E>::padded(a.width), parts = parts_of(a, block);
    rows.start(a, block);
    sums.start(block.queries(), width);
    rows.part(0, 0, block.tokens, sums);
    const int64_t together = a.chosen ? 1 : block.tokens;  // a token's choice is read once
    for (int64_t t = 0; t < block.tokens; t += together)
        for (int64_t number = 1; number < parts; number++) {
            part.start(together * block.heads, width);
            rows.part(number, t, t + together, part);
            sums.join(part, 0, together * block.heads, t * block.heads, width);
        }
    finish<X>(a, block, sums, width, 0, block.queries());
}

template <class X, class E>
void share_block(const Attention& a, const Block& block) {
    Sums& sums = room<X, E>().sums;
    std::vector<Sums>& part = room<X, E>().parts;
    const int64_t width = Tile<E>::padded(a.width), parts = parts_of(a, block);
    const int64_t wanted = (2 * a.threads + parts - 1) / parts;
    const int64_t most = std::max<int64_t>(1, std::min(wanted, block.heads / kLeastHeads));
    const int64_t heads = (block.heads + most - 1) / most;
    const int64_t shares = (block.heads + heads - 1) / heads;  // fewer, so that none is empty
    part.resize(std::min(parts, kWave) * shares);
    sums.start(block.queries(), width);
    for (int64_t low = 0; low < parts; low += kWave) {
        const int64_t many = std::min(kWave, parts - low);
        parallel(a.threads, many * shares, [&](int64_t i) {
            Block own = block;
            own.head += i % shares * heads;
            own.heads = std::min(heads, block.heads - i % shares * heads);
            part[i].start(own.queries(), width);
            Rows<X, E>& rows = room<X, E>().rows;
            rows.start(a, own);
            rows.part(low + i / shares, 0, block.tokens, part[i]);
        });
        parallel_ranges(a.threads, block.queries(), kJoinedQueries, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                for (int64_t n = 0; n < many; n++) {
                    int64_t share = r % block.heads / heads;
                    int64_t own_heads = std::min(heads, block.heads - share * heads);
                    int64_t own = r / block.heads * own_heads + r % block.heads % heads;
                    sums.join(part[n * shares + share], own, own + 1, r, width);
                }
            if (low + many == parts) finish<X>(a, block, sums, width, begin, end);
        });
    }
}

// -- The op

std::vector<Block> blocks(const Attention& a) {
    int64_t tokens = kBlockValues / (a.heads * a.width);
    tokens = std::max<int64_t>(1, std::min(tokens, kMostTokens));
    std::vector<Block> found;
    for (size_t b = 0; b < a.sequences.size(); b++) {
        const Stretch& s = a.sequences[b];
        for (int64_t at = 0; at < s.count; at += tokens)
            found.push_back(
                {&s, static_cast<int64_t>(b), at, std::min(tokens, s.count - at), 0, a.heads});
    }
    return found;
}

template <class X, class E>
void attend_all(const Attention& a) {
    std::vector<Block> found = blocks(a);
    const int64_t count = static_cast<int64_t>(found.size());
    if (a.threads > 1 && count < a.threads)
        for (const Block& block : found) share_block<X, E>(a, block);
    else
        parallel(a.threads, count, [&](int64_t i) { attend_block<X, E>(a, found[i]); });
}

}  // namespace

void attend(const Attention& a) {
    if (a.type == Float::f32) attend_all<float, float>(a);
    else if (a.layout.kind == RowKind::kv) attend_all<bf16, Exact>(a);
    else attend_all<bf16, float>(a);
}

}  // namespace overleap::OVERLEAP_ISA
