// JSON as the format allows it, in a flat list of nodes; a file may lie, so it takes little memory and time.
#pragma once
#include "memory.h"

namespace muws {

enum class Kind : uint8_t { STRING, INTEGER, REAL, BOOLEAN, NOTHING, LIST, OBJECT };

// Nodes are in the order of the text: a container is followed by its values; an object by its keys and values in turn.
struct Node {
  uint32_t start, stop;  // in the text: strings without their quotes
  uint32_t next;         // the node after this one and all inside it
  Kind kind;
  bool has_escape;
};

class Json {
 public:
  // Parses an object. `is_written` demands the bytes that this format writes, with nothing but spaces after them.
  Json(Budget &budget, Span text, const char *what, bool is_written);

  const Node &operator[](uint32_t node) const { return nodes[node]; }
  bool is(uint32_t node, Kind kind) const { return nodes[node].kind == kind; }
  uint32_t first(uint32_t container) const { return container + 1; }
  uint32_t end(uint32_t container) const { return nodes[container].next; }
  uint32_t next(uint32_t node) const { return nodes[node].next; }

  // How many values a list or an object has.
  uint32_t size(uint32_t container) const;

  // The value of a key, 0 (which is the whole object) if there is none.
  uint32_t get(uint32_t object, const char *key) const;

  // The same for a value that has to be of a kind; 0 only if it may be missing.
  uint32_t get(uint32_t object, const char *key, Kind kind, bool may_miss = false) const;
  void need(uint32_t node, Kind kind, const char *what) const;

  bool equals(uint32_t string, const char *ascii) const;
  Text text(uint32_t string) const;         // in UTF-8; half of a surrogate pair becomes three bytes
  int64_t integer(uint32_t node) const;     // one that is too large for 64 bits becomes the largest or smallest
  double real(uint32_t node) const;
  bool boolean(uint32_t node) const { return source[nodes[node].start] == 't'; }
  Span raw(uint32_t node) const;            // as it is written, a string without its quotes
  Shown shown(uint32_t node) const;
  bool nests_deeper(uint32_t node, uint32_t most) const;

 private:
  struct Units;
  [[noreturn]] void bad(const char *why) const;
  char peek() const { return at < n ? source[at] : '\0'; }
  void space();
  void value(uint32_t depth);
  void object(uint32_t depth);
  void list(uint32_t depth);
  void string();
  void number();
  void check_keys(uint32_t object);

  Budget &budget;
  const char *source;
  uint32_t n, at = 0;
  const char *what;
  bool is_written;
  List<Node> nodes;
};

}  // namespace muws
