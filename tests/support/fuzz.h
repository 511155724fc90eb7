// What the programs share that give C++ random input: a seed for each, checks that name it, and memory of an exact size.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      fprintf(stderr, "%s:%d: seed %lld: %s\n", __FILE__, __LINE__, seed, #condition); \
      exit(1);                                                                         \
    }                                                                                  \
  } while (0)

static long long seed;
static std::mt19937_64 random_bits;

static inline size_t below(size_t n) { return size_t(random_bits() % n); }

// Memory of exactly n elements, so that the sanitizers see any access outside: a vector may have more.
template <typename T>
struct Exactly {
  std::unique_ptr<T[]> data;
  int64_t n;
  explicit Exactly(int64_t n) : data(new T[size_t(n)]()), n(n) {}
  Exactly(const Exactly &other) : Exactly(other.n) { memcpy(data.get(), other.data.get(), size_t(n) * sizeof(T)); }
  T *get() const { return data.get(); }
  T &operator[](int64_t i) const { return data[size_t(i)]; }
};

// Calls what it is given for each of argv[1] seeds (10,000), the first of them argv[2] (0). Returns how many there were.
template <typename Do>
long long for_each_seed(int argc, char **argv, Do what) {
  const long long n = argc > 1 ? atoll(argv[1]) : 10000, first = argc > 2 ? atoll(argv[2]) : 0;
  for (seed = first; seed < first + n; seed++) {
    random_bits.seed(uint64_t(seed));
    what();
  }
  return n;
}
