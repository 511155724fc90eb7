// Refusals, and memory that is counted: a file never takes more than its limit.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <utility>
#include <vector>

#include "../coder.h"
#include "muws.h"

namespace muws {

// What every function in here throws; it never leaves api.cpp. It has no memory of its own.
struct Refusal {
  int32_t code;
  char text[sizeof(MuwsError::message)];
};

[[noreturn]] __attribute__((format(printf, 2, 3))) inline void refuse_as(int32_t code, const char *format, ...) {
  Refusal refusal;
  refusal.code = code;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(refusal.text, sizeof refusal.text, format, arguments);
  va_end(arguments);
  throw refusal;
}

#define REFUSE(...) ::muws::refuse_as(MUWS_REFUSED, __VA_ARGS__)

// A part of a text of a file that is safe to print: short, no control characters, no character cut in two or in half a pair.
struct Shown {
  char text[84];
  Shown(const char *from, size_t n) {
    const size_t most = sizeof text - 4;
    size_t some = n < most ? n : most;
    while (some < n && some > 0 && (from[some] & 0xc0) == 0x80) some--;
    for (size_t i = 0; i < some; i++) text[i] = (unsigned char)from[i] < 32 || from[i] == 127 ? '?' : from[i];
    for (size_t i = 0; i + 2 < some; i++)
      if ((unsigned char)text[i] == 0xed && (unsigned char)text[i + 1] >= 0xa0) memset(text + i, '?', 3);
    memcpy(text + some, some < n ? "..." : "", some < n ? 4 : 1);
  }
  template <typename Text>
  explicit Shown(const Text &from) : Shown(from.data(), from.size()) {}
};

constexpr uint64_t LARGE = 4 << 20;  // bytes of memory from which large pages pay
constexpr uint64_t KEPT = 1 << 20;   // and from which it pays to use them again: the system clears them each time

// How much a file may hold, holds and has held. Large memory is kept for the next chunk while the limit allows it.
struct Budget {
  uint64_t limit, used = 0, peak = 0;
  struct Block {
    void *memory;
    uint64_t n_bytes;
  } spare[8] = {};

  explicit Budget(uint64_t most) : limit(most) {}
  Budget(const Budget &) = delete;
  Budget &operator=(const Budget &) = delete;
  ~Budget() { drop(); }

  void drop() {
    for (Block &block : spare) {
      used -= block.n_bytes;
      free(block.memory);
      block = {};
    }
  }

  // Memory of at least n bytes; of hardly more, and kept from before, if there is such.
  Block large(uint64_t n) {
    for (Block &block : spare) {
      if (n < KEPT || block.n_bytes < n || block.n_bytes / 2 > n) continue;
      const Block found = block;
      block = {};
      return found;
    }
    const Block found = {allocate(n), n};
    if (n >= LARGE) muws_large_pages(found.memory, int64_t(n));
    return found;
  }

  void give_back(Block given) {
    Block *smallest = spare;
    for (Block &block : spare)
      if (block.n_bytes < smallest->n_bytes) smallest = &block;
    if (given.n_bytes >= KEPT && given.n_bytes > smallest->n_bytes) std::swap(*smallest, given);
    used -= given.n_bytes;
    free(given.memory);
  }

  void take(uint64_t n) {
    if (n > limit - used) drop();
    if (n > limit - used)
      refuse_as(MUWS_TOO_LARGE, "reading takes %llu bytes of memory, at most max_bytes=%llu are allowed",
                (unsigned long long)(n < UINT64_MAX - used ? used + n : UINT64_MAX), (unsigned long long)limit);
    used += n;
    if (used > peak) peak = used;
  }
  void give(uint64_t n) { used -= n; }

  void *allocate(uint64_t n) {
    take(n);
    void *found = malloc(n ? n : 1);
    if (!found) {
      give(n);
      refuse_as(MUWS_NO_MEMORY, "this machine has no %llu bytes of memory", (unsigned long long)n);
    }
    return found;
  }
};

// The allocator of the containers.
template <typename T>
struct Counted {
  using value_type = T;
  using propagate_on_container_move_assignment = std::true_type;
  using propagate_on_container_swap = std::true_type;
  Budget *budget;
  Counted(Budget &from) : budget(&from) {}
  template <typename U>
  Counted(const Counted<U> &other) : budget(other.budget) {}
  T *allocate(size_t n) { return static_cast<T *>(budget->allocate(n < UINT64_MAX / sizeof(T) ? n * sizeof(T) : UINT64_MAX)); }
  void deallocate(T *memory, size_t n) {
    budget->give(n * sizeof(T));
    free(memory);
  }
  template <typename U>
  bool operator==(const Counted<U> &other) const { return budget == other.budget; }
  template <typename U>
  bool operator!=(const Counted<U> &other) const { return budget != other.budget; }
};

template <typename T>
using List = std::vector<T, Counted<T>>;
using Text = std::basic_string<char, std::char_traits<char>, Counted<char>>;

// Bytes that are not set to zero first.
class Bytes {
 public:
  Bytes() = default;
  Bytes(Budget &from, uint64_t n) : budget(&from), block(from.large(n)), n_bytes(n) {}
  Bytes(Bytes &&other) noexcept { *this = std::move(other); }
  Bytes &operator=(Bytes &&other) noexcept {
    std::swap(budget, other.budget), std::swap(block, other.block), std::swap(n_bytes, other.n_bytes);
    return *this;
  }
  ~Bytes() {
    if (block.memory) budget->give_back(block);
  }
  uint8_t *data() const { return static_cast<uint8_t *>(block.memory); }
  uint64_t size() const { return n_bytes; }

 private:
  Budget *budget = nullptr;
  Budget::Block block = {};
  uint64_t n_bytes = 0;
};

// Bytes of somebody else.
struct Span {
  const uint8_t *data = nullptr;
  uint64_t n = 0;
};

}  // namespace muws
