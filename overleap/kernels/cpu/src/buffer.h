// Memory of a thread that begins on a cache line, so that no vector crosses two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
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

// The same without values: what is not written must not be read.
template <class T>
class RawBuffer {
  public:
    RawBuffer() = default;
    ~RawBuffer() { std::free(data_); }
    RawBuffer(const RawBuffer&) = delete;
    RawBuffer& operator=(const RawBuffer&) = delete;

    // What it held is gone.
    void resize(int64_t count) {
        std::free(data_);
        size_ = 0;
        data_ = std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64);
        if (!data_ && count) throw std::bad_alloc();
        size_ = count;
    }
    T* data() const { return static_cast<T*>(data_); }
    int64_t size() const { return size_; }

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace overleap
