// Values as packed cache rows, byte for byte as kernels/torch/quant.py packs them (and says why).
// Not here: reading them back (formats.h). Read next: kernels/torch/quant.py.
#include "formats.h"
#include "rows.h"
#include "threads.h"
#include "typed.h"

namespace overleap::OVERLEAP_ISA {
namespace {

// A small float; see quant._Format. `floor` is the least exponent of a scale.
struct Small {
    int lowest, mantissa, top_exponent;
    uint32_t top;
    int sign_bit, group, floor;
};
constexpr Small kE4m3{-6, 3, 8, 0x600000, 7, kKvGroup, -22};
constexpr Small kE2m1{0, 1, 2, 0x400000, 3, kFp4Group, -126};

vu bits_of(vf v) { return reinterpret_cast<vu>(v); }

// Bits of the largest size; those of a NaN are larger than any number's.
template <class E>
uint32_t largest_bits(const E* x, int64_t n) {
    vu top{};
    vectors(n, [&](int64_t i, auto lanes) {
        vu bits = bits_of(abs(lanes.read(x + i)));
        top = bits > top ? bits : top;
    });
    uint32_t found = 0;
    for (int i = 0; i < W; i++) found = top[i] > found ? top[i] : found;
    return found;
}

// Codes of one group, a byte each, up to a whole vector; returns its scale.
template <class E>
uint8_t encode(const E* x, int64_t n, const Small& f, uint8_t* codes) {
    typedef uint8_t bytes __attribute__((vector_size(W)));
    const uint32_t amax = largest_bits(x, n);
    const bool bad = amax >> 23 == 255;
    int exponent = static_cast<int>(amax >> 23) - 127 - f.top_exponent;
    exponent += (amax & 0x7fffffu) > f.top;
    if (exponent < f.floor) exponent = f.floor;
    const float unscale = bad ? 0.0f : e8m0(static_cast<uint8_t>(127 - exponent));
    const uint32_t shift = static_cast<uint32_t>(23 - f.mantissa) << 23;
    const uint32_t least = static_cast<uint32_t>(f.lowest + 127) << 23;
    const uint32_t origin = static_cast<uint32_t>(f.lowest + 127 + 23 - f.mantissa);
    vectors(n, [&](int64_t i, auto lanes) {
        vf v = lanes.read(x + i);
        vf scaled = bad ? vf{} : abs(v) * unscale;
        vu binade = bits_of(scaled) & 0xff800000u;
        vu magic = (binade > least ? binade : least - vu{}) + shift;
        vu steps = bits_of(scaled + reinterpret_cast<vf>(magic)) & 0x7fffffu;
        vu code = (((magic >> 23) - origin) << f.mantissa) + steps;
        code += bits_of(v) >> 31 << f.sign_bit;
        bytes narrow = __builtin_convertvector(code, bytes);
        std::memcpy(codes + i, &narrow, W);
    });
    return bad ? 255 : static_cast<uint8_t>(exponent + 127);
}

template <class E>
void pack_kv(const E* x, int64_t width, const Packing& p, uint8_t* out) {
    const int64_t plain = width - p.rotary;
    uint8_t* scale = out + plain + 2 * p.rotary;
    uint8_t codes[kKvGroup];
    for (int64_t i = 0; i < plain; i += kKvGroup) {
        int64_t n = plain - i < kKvGroup ? plain - i : kKvGroup;
        *scale++ = encode(x + i, n, kE4m3, codes);
        std::memcpy(out + i, codes, n);
    }
    vectors(p.rotary, [&](int64_t i, auto lanes) {
        bf16 rotary[W];
        store(rotary, lanes.read(x + plain + i));
        std::memcpy(out + plain + 2 * i, rotary, 2 * (p.rotary - i < W ? p.rotary - i : W));
    });
    std::memset(scale, 0, out + p.bytes - scale);
}

template <class E>
void pack_key(const E* x, int64_t width, uint8_t* out) {
    uint8_t* scale = out + width / 2;
    uint8_t codes[kFp4Group];
    for (int64_t i = 0; i < width; i += kFp4Group) {
        int64_t n = width - i < kFp4Group ? width - i : kFp4Group;
        *scale++ = encode(x + i, n, kE2m1, codes);
        for (int64_t j = 0; j < n / 2; j++)
            *out++ = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
    }
}

}  // namespace

void quantize(const Rows& r, const Packing& p) {
    typed(r.type, [&](auto e) {
        using E = decltype(e);
        parallel_ranges(r.threads, r.count, r.grain(), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                const E* x = static_cast<const E*>(r.x) + row * r.width;
                uint8_t* out = static_cast<uint8_t*>(r.out) + row * p.bytes;
                if (p.key) pack_key(x, r.width, out);
                else pack_kv(x, r.width, p, out);
            }
        });
    });
}

}  // namespace overleap::OVERLEAP_ISA
