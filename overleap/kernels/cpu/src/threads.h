// A pool of threads for loops over independent tasks. The caller works too.
// Results never depend on the number of threads: a task writes what no other task touches.
#pragma once

#include <cstdint>

namespace overleap {

// Runs body(context, i) for i in 0 .. tasks - 1 on up to `threads` threads, the caller's included.
void run_tasks(int threads, int64_t tasks, void (*body)(const void*, int64_t),
               const void* context);

template <class Body>
void parallel(int threads, int64_t tasks, const Body& body) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t i = 0; i < tasks; i++) body(i);
        return;
    }
    run_tasks(
        threads, tasks,
        [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
}

// As parallel, but a task is a range [begin, end) of at most `grain` items.
template <class Body>
void parallel_ranges(int threads, int64_t items, int64_t grain, const Body& body) {
    int64_t tasks = (items + grain - 1) / grain;
    auto range = [&](int64_t i) {
        int64_t end = (i + 1) * grain;
        body(i * grain, end < items ? end : items);
    };
    parallel(threads, tasks, range);
}

}  // namespace overleap
