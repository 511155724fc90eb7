// Threads and their scratch memory. A call for one thread starts none.
// If torch uses OpenMP, its threads run our tasks too: two pools would compete for the cores.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "api.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace {

long process() {
#if defined(_WIN32)
  return 0;
#else
  return (long)getpid();
#endif
}

// Workers sleep between jobs. A job is one task over numbered items, taken one by one.
class Pool {
 public:
  void run(int64_t threads, int64_t items, MuwsTask task, void* context) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while ((int64_t)workers_ < threads - 1) {
        std::thread([this, index = workers_] { work(index); }).detach();
        workers_++;
      }
      task_ = task, context_ = context, items_ = items, next_ = 0;
      helpers_ = threads - 1, busy_ = 0;
      job_++;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    helpers_ = 0;  // a worker that has not started by now is not needed
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void take() {
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
      if (item >= items_) return;
      task_(context_, item);
    }
  }
  void work(int64_t index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (index >= helpers_) continue;
      busy_++;
      lock.unlock();
      take();
      lock.lock();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int64_t workers_ = 0, helpers_ = 0, busy_ = 0, items_ = 0, next_ = 0;
  uint64_t job_ = 0;
  MuwsTask task_ = nullptr;
  void* context_ = nullptr;
};

std::mutex one_job;  // two Python threads may call at once; the second runs on its own thread alone
Pool* pool = nullptr;
long pool_process = 0;

// The OpenMP of torch: GOMP_parallel runs a function on several threads and waits for all of them; the others are
// omp_get_thread_num and omp_get_num_threads.
struct Team {
  void (*run)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*number)();
  int (*size)();
};
Team team = {};
std::atomic<long> team_process{0};

struct Job {
  int64_t items;
  MuwsTask task;
  void* context;
  std::atomic<int64_t> next{0};
};

// Every thread starts with the item of its own number in every call: its caches likely still hold what it reads.
void work_on(void* data) {
  Job& job = *(Job*)data;
  const int64_t size = team.size();
  for (int64_t item = team.number(); item < job.items; item = size + job.next.fetch_add(1, std::memory_order_relaxed))
    job.task(job.context, item);
}

bool team_is_there() {
  if (!team.run) return false;
  long none = 0;
  const long here = process();
  return team_process.compare_exchange_strong(none, here) || none == here;  // a fork takes no threads with it
}

thread_local const MuwsHost* host = nullptr;

struct Scratch {
  float* memory[2] = {nullptr, nullptr};
  size_t size[2] = {0, 0};
  ~Scratch() {
    for (float* m : memory) std::free(m);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void muws_use_team(void* run, void* number, void* size) {
  team.number = (int (*)())number, team.size = (int (*)())size;
  team.run = (void (*)(void (*)(void*), void*, unsigned, unsigned))run;
}

extern "C" void muws_use_host(const MuwsHost* used) { host = used; }

extern "C" void muws_parallel(int64_t threads, int64_t items, MuwsTask task, void* context) {
  if (threads > items) threads = items;
  if (threads > 1 && host) return host->run(host, threads, items, task, context);
  if (threads > 1 && team_is_there()) {
    Job job{items, task, context};
    team.run(work_on, &job, (unsigned)threads, 0);
    return;
  }
  if (threads > 1 && one_job.try_lock()) {
    if (!pool || pool_process != process()) {  // a fork takes no threads with it
      pool = new Pool();
      pool_process = process();
    }
    pool->run(threads, items, task, context);
    one_job.unlock();
    return;
  }
  for (int64_t item = 0; item < items; item++) task(context, item);
}

extern "C" float* muws_scratch(int slot, size_t n_floats) {
  static thread_local Scratch scratch;
#if defined(__SANITIZE_ADDRESS__)
  const bool fits = n_floats == scratch.size[slot];  // exactly, so that the sanitizer sees a read past the end
#else
  const bool fits = n_floats <= scratch.size[slot];
#endif
  if (!fits) {
    std::free(scratch.memory[slot]);
    scratch.size[slot] = 0;
    scratch.memory[slot] = (float*)std::aligned_alloc(64, (n_floats * sizeof(float) + 63) / 64 * 64);
    if (!scratch.memory[slot]) throw std::bad_alloc();
    scratch.size[slot] = n_floats;
  }
  return scratch.memory[slot];
}
