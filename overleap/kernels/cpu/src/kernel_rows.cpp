// Norms, rotation and the Hadamard transform of rows. Sums run over a row in an order that its
// width alone decides. Read next: kernels/torch/linear.py (the definition), kernel_quantize.cpp.
#include "rms.h"
#include "rows.h"
#include "threads.h"
#include "typed.h"

namespace overleap::OVERLEAP_ISA {
namespace {

// Cosine and sine for every rotary dim of one position; sines carry the sign of their dim.
struct Angles {
    float cos[kMostRotary], sin[kMostRotary];
};

// In double: an angle of a million radians keeps every bit of a float's sine. Plain loops, which
// the compiler turns into vectors without changing a bit.
void set(Angles& a, const Turn& t, int64_t position) {
    const int64_t pairs = t.rotary / 2;
    constexpr double magic = 0x1.8p52;               // adding it rounds to a whole number
    constexpr double high = 0x1.921fb544p0;          // pi / 2 in 33 bits: exact times 20 bits
    constexpr double low = 0x1.0b4611a626331p-34;    // the rest of it
    float cosine[kMostRotary / 2], sine[kMostRotary / 2];
    for (int64_t i = 0; i < pairs; i++) {
        double angle = static_cast<float>(position) * t.frequency[i];
        double turns = (angle * 0x1.45f306dc9c883p-1 + magic) - magic;
        double x = (angle - turns * high) - turns * low, y = x * x;
        double s = -1.0 / 39916800, c = -1.0 / 3628800;
        s = s * y + 1.0 / 362880, c = c * y + 1.0 / 40320;
        s = s * y - 1.0 / 5040, c = c * y - 1.0 / 720;
        s = s * y + 1.0 / 120, c = c * y + 1.0 / 24;
        s = s * y - 1.0 / 6, c = c * y - 0.5;
        s = s * y * x + x, c = c * y + 1.0;
        int32_t quarter = static_cast<int32_t>(turns);
        double sin = quarter & 1 ? c : s, cos = quarter & 1 ? s : c;
        sine[i] = static_cast<float>(quarter & 2 ? -sin : sin);
        cosine[i] = static_cast<float>((quarter + 1) & 2 ? -cos : cos);
    }
    for (int64_t i = 0; i < pairs; i++) {
        float sin = t.inverse ? -sine[i] : sine[i];
        a.cos[2 * i] = a.cos[2 * i + 1] = cosine[i];
        a.sin[2 * i] = -sin, a.sin[2 * i + 1] = sin;
    }
}

// value(v, i, lanes), made for each row from its address, is what is rotated and stored.
template <class E, class Make>
void rotated_rows(const Rows& r, const Turn& t, const Make& make) {
    const int64_t plain = r.width - t.rotary;
    parallel_ranges(r.threads, r.count, r.grain(), [&](int64_t first, int64_t last) {
        Angles angles;
        int64_t token = -1;
        for (int64_t row = first; row < last; row++) {
            if (t.rotary && row / r.heads != token)
                token = row / r.heads, set(angles, t, t.position[token]);
            const E* x = static_cast<const E*>(r.x) + row * r.width;
            E* out = static_cast<E*>(r.out) + row * r.width;
            auto value = make(x);
            vectors(plain, [&](int64_t i, auto lanes) {
                lanes.write(out + i, value(lanes.read(x + i), i, lanes));
            });
            vectors(t.rotary, [&](int64_t i, auto lanes) {
                vf v = value(lanes.read(x + plain + i), plain + i, lanes);
                vf turned = exchanged<1>(v) * lanes.read(angles.sin + i);
                lanes.write(out + plain + i, fma(v, lanes.read(angles.cos + i), turned));
            });
        }
    });
}

// weigh(v, i, lanes) multiplies by the weights, where there are any.
template <class Body>
void weighted(const Norm& n, const Body& body) {
    if (!n.weight) return body([](vf v, int64_t, auto) { return v; });
    typed(n.weight_type, [&](auto e) {
        auto* weight = static_cast<const decltype(e)*>(n.weight);
        body([=](vf v, int64_t i, auto lanes) { return v * lanes.read(weight + i); });
    });
}

// The stages of a transform of n values that stay within a vector, from Half on.
template <int Half>
vf butterflies(vf v, int64_t n) {
    if constexpr (Half < W) {
        if (Half >= n) return v;
        vf sign;
        for (int lane = 0; lane < W; lane++) sign[lane] = lane & Half ? -1.0f : 1.0f;
        return butterflies<2 * Half>(fma(v, sign, exchanged<Half>(v)), n);
    }
    return v;
}

template <class E>
void hadamard_row(const E* x, E* out, int64_t n) {
    alignas(64) float row[kMostHadamard + W];
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
    vectors(n, [&](int64_t i, auto lanes) {
        vf v = lanes.read(x + i);
        v = butterflies<1>(v, n);
        store(row + i, v);
    });
    for (int64_t half = W; half < n; half *= 2)
        for (int64_t block = 0; block < n; block += 2 * half)
            for (int64_t i = block; i < block + half; i += W) {
                vf low = load(row + i), high = load(row + i + half);
                store(row + i, low + high);
                store(row + i + half, low - high);
            }
    vectors(n, [&](int64_t i, auto lanes) { lanes.write(out + i, load(row + i) * scale); });
}

}  // namespace

void norm_rope(const Rows& r, const Norm& n, const Turn& t) {
    typed(r.type, [&](auto e) {
        using E = decltype(e);
        weighted(n, [&](auto weigh) {
            rotated_rows<E>(r, t, [&](const E* x) {
                float factor = inverse_rms(x, r.width, n.eps);
                return [=](vf v, int64_t i, auto lanes) { return weigh(v * factor, i, lanes); };
            });
        });
    });
}

void rms_norm(const Rows& r, const Norm& n) { norm_rope(r, n, Turn{}); }

void rotate(const Rows& r, const Turn& t) {
    typed(r.type, [&](auto e) {
        using E = decltype(e);
        rotated_rows<E>(r, t, [](const E*) { return [](vf v, int64_t, auto) { return v; }; });
    });
}

void hadamard(const Rows& r) {
    typed(r.type, [&](auto e) {
        using E = decltype(e);
        parallel_ranges(r.threads, r.count, r.grain(), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                hadamard_row(static_cast<const E*>(r.x) + row * r.width,
                             static_cast<E*>(r.out) + row * r.width, r.width);
        });
    });
}

}  // namespace overleap::OVERLEAP_ISA
