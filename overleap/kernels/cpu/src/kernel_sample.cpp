// A token from a row of logits: the largest, or one drawn from what the cuts leave; log-probabilities.
// Probabilities are doubles; a greedy row is read once and costs no exponential.
// Read next: kernels/torch/sample.py (the definition), best.h.
#include "sampling.h"

#include <limits>

#include "best.h"
#include "simd.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {
namespace {

// Half as many doubles as floats fit into a vector.
constexpr int D = W / 2;
typedef double vd __attribute__((vector_size(8 * D)));
typedef int64_t vl __attribute__((vector_size(8 * D)));
typedef float hf __attribute__((vector_size(4 * D)));

constexpr int64_t kBlock = 1024;  // tokens that are searched, or added up, together
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Largest {
    float value;
    int64_t at;  // the first of equal ones
    bool sound;  // every value is below +inf, and a number
};

Largest largest_of(const float* x, int64_t n) {
    Largest found{-kInfinity, 0, true};
    int64_t block = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t end = std::min(n, first + kBlock);
        vf most = all(-kInfinity);
        vi sound = ~vi{};
        int64_t i = first;
        for (; i + W <= end; i += W) {
            vf v = load(x + i);
            most = max(v, most);
            sound &= v < all(kInfinity);
        }
        float value = largest(most);
        for (int lane = 0; lane < W; lane++) found.sound &= sound[lane] != 0;
        for (; i < end; i++) {
            value = x[i] > value ? x[i] : value;
            found.sound &= x[i] < kInfinity;
        }
        if (value > found.value) found.value = value, block = first;
    }
    found.at = block;
    while (found.at < n && x[found.at] != found.value) found.at++;
    return found;
}

// e^x for x <= 0, within 2 ulp; 0 below -708.
vd exponential(vd x) {
    constexpr double magic = 0x1.8p52;  // adding it leaves the nearest whole number in the low bits
    const vd bounded = x < -708.0 ? vd{} - 708.0 : x;
    const vd shifted = bounded * 0x1.71547652b82fep0 + magic, turns = shifted - magic;
    const vd r = (bounded - turns * 0x1.62e42feep-1) - turns * 0x1.a39ef35793c76p-33;
    vd p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0, p = p * r + 1.0 / 3628800.0, p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0, p = p * r + 1.0 / 5040.0, p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0, p = p * r + 1.0 / 24.0, p = p * r + 1.0 / 6.0;
    p = p * r + 0.5, p = p * r + 1.0, p = p * r + 1.0;
    const vl bits = reinterpret_cast<vl>(p) + (reinterpret_cast<vl>(shifted) << 52);
    return x < -708.0 ? vd{} : reinterpret_cast<vd>(bits);
}

// What a logit weighs beside the largest one; what is below `least` weighs nothing.
struct Weigh {
    double top, temperature, least;

    vd of(hf x) const {
        const vd e = exponential((__builtin_convertvector(x, vd) - top) / temperature);
        return e >= least ? e : vd{};
    }
    double of(float x) const { return of(x - hf{})[0]; }
};

// Weights of up to kBlock tokens, and their sum.
double weigh_block(const Weigh& weigh, const float* x, int64_t n, double* out) {
    float padded[kBlock];
    if (n % D) {  // what is behind a row weighs nothing
        std::fill(std::copy(x, x + n, padded), padded + kBlock, -kInfinity);
        x = padded;
    }
    vd total{};
    for (int64_t i = 0; i < n; i += D) {
        hf v;
        std::memcpy(&v, x + i, sizeof v);
        const vd e = weigh.of(v);
        std::memcpy(out + i, &e, sizeof e);
        total += e;
    }
    double sum = 0;
    for (int lane = 0; lane < D; lane++) sum += total[lane];
    return sum;
}

// The weights of a row, added up block by block, so that one can be found without keeping all.
class Blocks {
  public:
    double weigh(const Weigh& weigh, const float* x, int64_t n) {
        weigh_ = weigh, x_ = x, n_ = n;
        sums_.clear();
        double total = 0;
        for (int64_t first = 0; first < n; first += kBlock) {
            sums_.push_back(weigh_block(weigh, x + first, std::min(kBlock, n - first), part_));
            total += sums_.back();
        }
        return total;
    }

    // The token that `target`, below the total, falls on; the last one that weighs anything if
    // the sums round up to less.
    int64_t find(double target) {
        double before = 0;
        size_t block = 0, last = 0;
        for (; block < sums_.size(); block++) {
            if (sums_[block] > 0) last = block;
            if (before + sums_[block] > target) break;
            before += sums_[block];
        }
        if (block == sums_.size()) before -= sums_[block = last];
        const int64_t first = static_cast<int64_t>(block) * kBlock;
        const int64_t count = std::min(kBlock, n_ - first);
        weigh_block(weigh_, x_ + first, count, part_);
        int64_t found = 0;
        for (int64_t i = 0; i < count; i++) {
            if (part_[i] > 0) found = first + i;
            if ((before += part_[i]) > target) break;
        }
        return found;
    }

  private:
    Weigh weigh_{};
    const float* x_ = nullptr;
    int64_t n_ = 0;
    std::vector<double> sums_;
    double part_[kBlock];
};

// Rows end where they end: the last vector is offered from a copy.
void offer_all(Best& best, const float* x, int64_t n) {
    const int64_t whole = n / W * W;
    for (int64_t i = 0; i < whole; i += Best::kOffered)
        best.offer(x + i, i, static_cast<int>(std::min<int64_t>(Best::kOffered, whole - i)));
    float rest[W] = {};
    std::memcpy(rest, x + whole, static_cast<size_t>(4 * (n - whole)));
    best.offer(rest, whole, static_cast<int>(n - whole));
}

struct Candidate {
    int64_t id;
    double weight;
};

// What one thread needs, whatever the rows.
struct Room {
    Best best;
    Blocks blocks;
    std::vector<float> open;
    std::vector<uint64_t> ranks;
    std::vector<Candidate> kept;
};

// Larger is better: the logit above, the inverted id below.
uint64_t rank(int32_t order, int64_t id) {
    const uint64_t high = static_cast<uint32_t>(order) ^ 0x80000000u;
    return high << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}

// Ranks of the k largest, in no order.
void rank_largest(Room& room, const float* x, int64_t n, int64_t k) {
    room.best.start(k, n);
    offer_all(room.best, x, n);
    room.best.take(room.ranks);
    for (uint64_t& kept : room.ranks)
        kept = rank(static_cast<int32_t>(kept >> 32), static_cast<uint32_t>(kept));
}

// Ranks of all tokens of at least this logit, in no order.
void rank_from(Room& room, const float* x, int64_t n, float least) {
    const int32_t bar = sortable(all(least))[0];
    room.ranks.clear();
    for (int64_t i = 0; i < n; i += W) {
        const int count = static_cast<int>(std::min<int64_t>(W, n - i));
        const vi order = sortable(count == W ? load(x + i) : load_part(x + i, count));
        uint32_t found = lanes_at_least(order, bar);
        if (count < W) found &= (1u << count) - 1;
        for (; found; found &= found - 1) {
            const int lane = __builtin_ctz(found);
            room.ranks.push_back(rank(order[lane], i + lane));
        }
    }
}

double weight_of(const Room& room, const float* x, const Weigh& weigh) {
    double total = 0;
    for (uint64_t rank : room.ranks) total += weigh.of(x[static_cast<uint32_t>(~rank)]);
    return total;
}

// Enough of the likeliest tokens to hold the share top_p, and little more. Returns the whole weight.
double rank_share(Room& room, const float* x, int64_t n, const Weigh& weigh, double top_p) {
    constexpr int kFar = 63;
    double part[kBlock], held[kFar + 1] = {};  // by the distance from the largest, in temperatures
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t count = std::min(kBlock, n - first);
        weigh_block(weigh, x + first, count, part);
        for (int64_t i = 0; i < count; i++) {
            const double distance = (weigh.top - x[first + i]) / weigh.temperature;
            held[distance < kFar ? static_cast<int>(distance) : kFar] += part[i];
        }
    }
    double total = 0, near = 0;
    for (double weight : held) total += weight;
    int reach = 0;
    while (reach < kFar && (near += held[reach]) < total * (top_p + 1e-9)) reach++;
    // A float's rounding must not leave out a token at the edge: that much further, or all.
    double bar = weigh.top - (reach + 1) * weigh.temperature;
    bar -= 1e-6 * std::abs(bar);
    rank_from(room, x, n, reach == kFar || bar < -3e38 ? -kInfinity : static_cast<float>(bar));
    return total;
}

// The candidates, likeliest first until a cut ends them. Sorted only as far as they reach.
void cut(Room& room, const float* x, const Weigh& weigh, double total, double top_p) {
    const size_t n = room.ranks.size();
    room.kept.clear();
    double before = 0;
    for (size_t done = 0, step = 256; done < n; done += step, step *= 4) {
        auto from = room.ranks.begin() + static_cast<int64_t>(done), to = room.ranks.end();
        if (step < n - done) {
            to = from + static_cast<int64_t>(step);
            std::nth_element(from, to - 1, room.ranks.end(), std::greater<uint64_t>());
        }
        std::sort(from, to, std::greater<uint64_t>());
        for (; from != to; ++from) {
            const int64_t id = static_cast<uint32_t>(~*from);
            const double weight = weigh.of(x[id]);
            if (weight <= 0 || (top_p < 1 && before >= top_p)) return;
            room.kept.push_back({id, weight});
            before += weight / total;
        }
    }
}

int64_t drawn(std::vector<Candidate>& kept, double number) {
    std::sort(kept.begin(), kept.end(), [](auto a, auto b) { return a.id < b.id; });
    double total = 0, before = 0;
    for (const Candidate& c : kept) total += c.weight;
    for (const Candidate& c : kept)
        if ((before += c.weight) > number * total) return c.id;
    return kept.back().id;
}

int64_t choose(Room& room, const Sampling& s, int64_t row, const float* x, const Largest& top) {
    const int64_t n = s.vocabulary, k = s.choices.top_k[row];
    const double temperature = s.choices.temperature[row], top_p = s.choices.top_p[row];
    if (temperature == 0) return top.at;
    const Weigh weigh{top.value, temperature, s.choices.min_p[row]};
    if (k >= n && top_p >= 1) {
        const double total = room.blocks.weigh(weigh, x, n);
        return room.blocks.find(s.choices.number[row] * total);
    }
    const Weigh uncut{top.value, temperature, 0};
    double total = 0;
    if (k < n) {
        rank_largest(room, x, n, k);
        total = weight_of(room, x, uncut);
    } else {
        total = rank_share(room, x, n, uncut, top_p);
    }
    cut(room, x, weigh, total, top_p);
    return drawn(room.kept, s.choices.number[row]);
}

void score(Room& room, const Sampling& s, const float* x, float top, int64_t* ids, double* out) {
    const double log_total = std::log(room.blocks.weigh({top, 1.0, 0.0}, x, s.vocabulary));
    if (s.best) {
        room.best.start(s.best, s.vocabulary);
        offer_all(room.best, x, s.vocabulary);
        room.best.write(ids + 1);
    }
    for (int64_t i = 0; i <= s.best; i++)
        out[i] = ids[i] < 0 ? -std::numeric_limits<double>::infinity()
                            : (static_cast<double>(x[ids[i]]) - top) - log_total;
}

// The row with -inf where a token may not be chosen. A byte of eight alike is done at once: masks
// of grammars are mostly such.
const float* masked(Room& room, const float* x, const uint8_t* allowed, int64_t n) {
    room.open.assign(static_cast<size_t>(n), -kInfinity);
    float* open = room.open.data();
    for (int64_t i = 0; i < n; i += 8) {
        const uint8_t byte = allowed[i / 8];
        const int64_t end = std::min(n, i + 8);
        if (byte == 0xff) std::copy(x + i, x + end, open + i);
        else if (byte)
            for (int64_t j = i; j < end; j++)
                if (byte >> (j - i) & 1) open[j] = x[j];
    }
    return open;
}

void sample_row(const Sampling& s, int64_t row) {
    static thread_local Room room;
    const int64_t n = s.vocabulary, width = s.best < 0 ? 1 : 1 + s.best;
    const float *x = s.logits + row * n, *open = x;
    int64_t* ids = s.ids + row * width;
    double* logprob = s.best < 0 ? nullptr : s.logprob + row * width;
    const Largest whole = largest_of(x, n);
    Largest top = whole;
    if (s.allowed && whole.sound) {
        open = masked(room, x, s.allowed + row * ((n + 7) / 8), n);
        top = largest_of(open, n);
    }
    if (!whole.sound || top.value == -kInfinity) {
        std::fill(ids, ids + width, -1);
        if (logprob) std::fill(logprob, logprob + width, std::nan(""));
        return;
    }
    ids[0] = choose(room, s, row, open, top);
    if (logprob) score(room, s, x, whole.value, ids, logprob);
}

}  // namespace

void sample(const Sampling& s) {
    parallel(s.threads, s.rows, [&](int64_t row) { sample_row(s, row); });
}

}  // namespace overleap::OVERLEAP_ISA
