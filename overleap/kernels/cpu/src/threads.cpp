// Workers spin for a moment between loops, then sleep; a loop does not wait for a sleeper.
#include "threads.h"

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace overleap {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds: longer than Python needs between two calls

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    void run(int threads, int64_t tasks, void (*body)(const void*, int64_t),
               const void* context) {
        std::lock_guard<std::mutex> one_loop(mutex_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            int number = static_cast<int>(workers_.size());
            workers_.emplace_back([this, number] { work(number); });
        }
        body_ = body, context_ = context, tasks_ = tasks, helpers_ = threads - 1;
        next_.store(0);
        open_.store(true);
        round_.fetch_add(1);
        if (asleep_.load()) round_.notify_all();
        drain();
        open_.store(false);
        // A worker that the system has put aside needs this core, if there is no other.
        for (int spin = 0; inside_.load(); spin++)
            spin < kSpins ? pause() : std::this_thread::yield();
        if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
    }

  private:
    // What a task throws, the caller throws once nobody works any more: the first of several.
    void drain() {
        try {
            for (int64_t i = next_.fetch_add(1); i < tasks_; i = next_.fetch_add(1))
                body_(context_, i);
        } catch (...) {
            next_.store(tasks_);
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    void work(int number) {
        uint32_t seen = 0;
        while (true) {
            for (int spin = 0; spin < kSpins && round_.load() == seen; spin++) pause();
            if (round_.load() == seen) {
                asleep_.fetch_add(1);
                round_.wait(seen);
                asleep_.fetch_sub(1);
            }
            seen = round_.load();
            // Either this sees that the loop is over, or the caller sees that somebody is inside.
            inside_.fetch_add(1);
            if (open_.load() && number < helpers_) drain();
            inside_.fetch_sub(1);
        }
    }

    std::mutex mutex_;
    std::vector<std::thread> workers_;
    std::atomic<uint32_t> round_{0};
    std::atomic<int> inside_{0}, asleep_{0};
    std::atomic<bool> open_{false}, failed_{false};
    std::exception_ptr error_;
    std::atomic<int64_t> next_{0};
    int64_t tasks_ = 0;
    int helpers_ = 0;
    void (*body_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
};

}  // namespace

void run_tasks(int threads, int64_t tasks, void (*body)(const void*, int64_t),
               const void* context) {
    // Never destroyed: workers live as long as the process. A forked child has none of its
    // parent's threads, so it makes a pool of its own.
    static std::atomic<pid_t> owner{0};
    static std::atomic<Pool*> pool{nullptr};
    static std::mutex making;
    if (owner.load() != getpid()) {
        std::lock_guard<std::mutex> once(making);
        if (owner.load() != getpid()) {
            pool.store(new Pool);
            owner.store(getpid());
        }
    }
    pool.load()->run(threads, tasks, body, context);
}

}  // namespace overleap
