// Calls of ops, kept to be made again: a step like the one before needs no Python between its ops.
//
// A call keeps its arguments as they were. Addresses must hold what they held then; where sequences
// stand is told by reference, so that it may move on. Who records sees to both: ../tape.py.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace overleap {

class Tape {
  public:
    void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
    void play() const {
        for (const auto& call : calls_) call();
    }

  private:
    std::vector<std::function<void()>> calls_;
};

// Where calls of this thread are kept, null for nowhere.
extern thread_local Tape* recording;

// The op as Python calls it: made, and kept where this thread records.
template <class... A>
auto taped(void (*op)(A...)) {
    return [op](A... given) {
        op(given...);
        if (recording) recording->add([op, given...] { op(given...); });
    };
}

}  // namespace overleap
