// Memory of a thread that begins on a cache line, so that no vector crosses two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace overleap {

template <class E>
struct OnLines {
    typedef E value_type;
    static constexpr std::align_val_t line{64};

    OnLines() = default;
    template <class F>
    OnLines(const OnLines<F>&) {}
    E* allocate(std::size_t count) {
        return static_cast<E*>(::operator new(count * sizeof(E), line));
    }
    void deallocate(E* p, std::size_t) { ::operator delete(p, line); }
    bool operator==(const OnLines&) const { return true; }
};

template <class E>
using Buffer = std::vector<E, OnLines<E>>;

}  // namespace overleap
