#include "json.h"

#include <math.h>

#include <algorithm>
#include <charconv>
#include <locale>
#include <sstream>

namespace muws {

constexpr uint32_t MAX_DEPTH = 900, MAX_DIGITS = 4300;

namespace {

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

constexpr long long FAR = 1000000000;  // an exponent beyond the digits of any file

bool is_digit(char c) { return c >= '0' && c <= '9'; }

constexpr char SHORT[] = "\"\\/bfnrt", MEANT[] = "\"\\/\b\f\n\r\t";

// The value of a number in the grammar of JSON, whatever the locale is; infinity where it is too large.
double to_double(const char *from, const char *to) {
#if defined(__cpp_lib_to_chars)
  double found = 0;
  if (std::from_chars(from, to, found).ec != std::errc::result_out_of_range) return found;
  // too large or too small: the place of the first digit that is not 0 tells
  long long exponent = 0, place = 0;
  bool is_after = false, is_found = false;
  for (const char *c = from; c < to; c++) {
    if (*c == 'e' || *c == 'E') {
      const bool is_negative = c[1] == '-';
      for (c += 1 + (is_negative || c[1] == '+'); c < to; c++)
        if (exponent < FAR) exponent = 10 * exponent + (*c - '0');
      exponent = is_negative ? -exponent : exponent;
      break;
    }
    if (*c == '.') is_after = true;
    if (!is_digit(*c)) continue;
    if (*c != '0') is_found = true;
    if (is_found && !is_after) place++;
    if (!is_found && is_after) place--;
  }
  return is_found && exponent + place > 0 ? HUGE_VAL : 0.0;
#else
  std::istringstream stream(std::string(from, to));
  stream.imbue(std::locale::classic());
  double found = 0;
  return stream >> found ? found : fabs(found) > 1 ? HUGE_VAL : 0.0;
#endif
}

}  // namespace

// The UTF-16 units of a string.
struct Json::Units {
  const char *at, *end;

  bool is_done() const { return at >= end; }

  uint32_t next() {
    if (*at != '\\') return (unsigned char)*at++;
    const char mark = at[1];
    if (mark != 'u') {
      at += 2;
      return (unsigned char)MEANT[strchr(SHORT, mark) - SHORT];
    }
    uint32_t unit = 0;
    for (int i = 2; i < 6; i++) unit = unit << 4 | uint32_t(hex_digit(at[i]));
    at += 6;
    return unit;
  }

  // Less than 0, 0 or more than 0, as memcmp.
  static int compare(Units a, Units b) {
    for (;;) {
      if (a.is_done() || b.is_done()) return int(b.is_done()) - int(a.is_done());
      const uint32_t one = a.next(), other = b.next();
      if (one != other) return one < other ? -1 : 1;
    }
  }
};

Json::Json(Budget &from, Span text, const char *name, bool written)
    : budget(from), source((const char *)text.data), n(uint32_t(text.n)), what(name), is_written(written), nodes(from) {
  uint64_t most = 2;
  for (uint32_t i = 0; i < n; i++) {
    const char c = source[i];
    if ((unsigned char)c > 127) bad("it is not ASCII");
    most += c == ',' || c == ':' || c == '[' || c == '{';
  }
  nodes.reserve(most);
  value(0);
  while (at < n && (is_written ? source[at] == ' ' : strchr(" \t\n\r", source[at]) != nullptr && source[at])) at++;
  if (at < n) bad("more follows");
  if (!is(0, Kind::OBJECT)) REFUSE("the %s is no JSON object", what);
}

void Json::bad(const char *why) const {
  if (is_written) REFUSE("the %s is not written as this format writes it: %s at byte %u", what, why, at);
  REFUSE("the %s is not JSON that this format allows: %s at byte %u", what, why, at);
}

void Json::space() {
  while (!is_written && at < n && (source[at] == ' ' || source[at] == '\t' || source[at] == '\n' || source[at] == '\r')) at++;
}

void Json::value(uint32_t depth) {
  if (depth > MAX_DEPTH) bad("it nests too deep");
  space();
  const uint32_t node = uint32_t(nodes.size());
  const char mark = peek();
  if (mark == '{') return object(depth);
  if (mark == '[') return list(depth);
  if (mark == '"') return string();
  static const char *const words[] = {"true", "false", "null"};
  for (const char *word : words) {
    const uint32_t length = uint32_t(strlen(word));
    if (n - at < length || memcmp(source + at, word, length)) continue;
    nodes.push_back({at, at + length, node + 1, *word == 'n' ? Kind::NOTHING : Kind::BOOLEAN, false});
    at += length;
    return;
  }
  number();
}

void Json::object(uint32_t depth) {
  const uint32_t node = uint32_t(nodes.size());
  nodes.push_back({at++, 0, 0, Kind::OBJECT, false});
  space();
  for (bool is_first = true; peek() != '}' || !is_first; is_first = false) {
    if (!is_first && peek() != ',') bad("a comma or a brace is needed");
    at += !is_first;
    space();
    if (peek() != '"') bad("a key is needed");
    string();
    space();
    if (peek() != ':') bad("a colon is needed");
    at++;
    value(depth + 1);
    space();
    if (peek() == '}') break;
  }
  nodes[node].stop = ++at;
  nodes[node].next = uint32_t(nodes.size());
  check_keys(node);
}

void Json::list(uint32_t depth) {
  const uint32_t node = uint32_t(nodes.size());
  nodes.push_back({at++, 0, 0, Kind::LIST, false});
  space();
  for (bool is_first = true; peek() != ']' || !is_first; is_first = false) {
    if (!is_first && peek() != ',') bad("a comma or a bracket is needed");
    at += !is_first;
    value(depth + 1);
    space();
    if (peek() == ']') break;
  }
  nodes[node].stop = ++at;
  nodes[node].next = uint32_t(nodes.size());
}

void Json::string() {
  const uint32_t node = uint32_t(nodes.size()), start = ++at;
  bool has_escape = false;
  for (;; at++) {
    if (at >= n) bad("a string is open");
    const char c = source[at];
    if (c == '"') break;
    if ((unsigned char)c < 32) bad("a string has a control character");
    if (c == 127 && is_written) bad("a character is not escaped");
    if (c != '\\') continue;
    has_escape = true;
    const char mark = at + 1 < n ? source[at + 1] : '\0';
    if (mark == 'u') {
      uint32_t unit = 0;
      if (n - at < 6) bad("an escape is broken");
      for (uint32_t i = at + 2; i < at + 6; i++) {
        if (hex_digit(source[i]) < 0) bad("an escape is broken");
        if (is_written && source[i] >= 'A' && source[i] <= 'F') bad("an escape has large letters");
        unit = unit << 4 | uint32_t(hex_digit(source[i]));
      }
      if (is_written && ((unit >= 32 && unit < 127) || (unit && unit < 32 && strchr(MEANT, char(unit)))))
        bad("an escape is not needed");
      at += 5;
    } else {
      if (!mark || !strchr(SHORT, mark)) bad("an escape is broken");
      if (mark == '/' && is_written) bad("an escape is not needed");
      at++;
    }
  }
  nodes.push_back({start, at++, node + 1, Kind::STRING, has_escape});
}

void Json::number() {
  const uint32_t start = at;
  const auto digits = [&] {
    const uint32_t before = at;
    while (is_digit(peek())) at++;
    return at - before;
  };
  at += peek() == '-';
  const bool begins_with_zero = peek() == '0';
  const uint32_t n_digits = begins_with_zero ? (at++, 1) : digits();
  if (!n_digits) bad("a value is needed");
  bool is_real = false;
  if (peek() == '.' && at + 1 < n && is_digit(source[at + 1])) {
    is_real = true;
    at++;
    digits();
  }
  if (peek() == 'e' || peek() == 'E') {
    const uint32_t sign = at + 1 < n && (source[at + 1] == '+' || source[at + 1] == '-');
    if (at + 1 + sign < n && is_digit(source[at + 1 + sign])) {
      is_real = true;
      at += 1 + sign;
      digits();
    }
  }
  if (!is_real && n_digits > MAX_DIGITS) bad("a number has more than 4300 digits");
  if (!is_real && is_written && begins_with_zero && source[start] == '-') bad("a zero has a sign");
  if (is_real && !isfinite(to_double(source + start, source + at))) bad("a number is not finite");
  nodes.push_back({start, at, uint32_t(nodes.size()) + 1, is_real ? Kind::REAL : Kind::INTEGER, false});
}

// Sorting takes no more time for keys that somebody chose.
void Json::check_keys(uint32_t object) {
  List<uint32_t> keys(budget);
  keys.reserve(size(object));
  for (uint32_t key = first(object); key < end(object); key = next(next(key))) keys.push_back(key);
  const auto units = [&](uint32_t key) { return Units{source + nodes[key].start, source + nodes[key].stop}; };
  std::sort(keys.begin(), keys.end(), [&](uint32_t a, uint32_t b) { return Units::compare(units(a), units(b)) < 0; });
  for (size_t i = 1; i < keys.size(); i++)
    if (!Units::compare(units(keys[i - 1]), units(keys[i]))) bad("a key occurs twice");
}

uint32_t Json::size(uint32_t container) const {
  uint32_t found = 0;
  for (uint32_t node = first(container); node < end(container); node = next(node)) found++;
  return is(container, Kind::OBJECT) ? found / 2 : found;
}

uint32_t Json::get(uint32_t object, const char *key) const {
  for (uint32_t node = first(object); node < end(object); node = next(next(node)))
    if (equals(node, key)) return next(node);
  return 0;
}

uint32_t Json::get(uint32_t object, const char *key, Kind kind, bool may_miss) const {
  const uint32_t found = get(object, key);
  if (found) need(found, kind, key);
  else if (!may_miss) REFUSE("the %s has no %s", what, key);
  return found;
}

void Json::need(uint32_t node, Kind kind, const char *name) const {
  static const char *const names[] = {"string", "whole number", "number with a point or an exponent", "boolean", "null", "list", "object"};
  if (!is(node, kind)) REFUSE("%s is '%s', a %s is needed", name, shown(node).text, names[int(kind)]);
}

bool Json::equals(uint32_t string, const char *ascii) const {
  const Node &node = nodes[string];
  const size_t length = strlen(ascii);
  if (node.kind != Kind::STRING) return false;
  if (!node.has_escape) return node.stop - node.start == length && !memcmp(source + node.start, ascii, length);
  return !Units::compare({source + node.start, source + node.stop}, {ascii, ascii + length});
}

Text Json::text(uint32_t string) const {
  const Node &node = nodes[string];
  Text found(Counted<char>{budget});
  if (!node.has_escape) return found.assign(source + node.start, node.stop - node.start);
  Units units{source + node.start, source + node.stop};
  while (!units.is_done()) {
    uint32_t code = units.next();
    if (code >= 0xd800 && code < 0xdc00 && !units.is_done()) {
      Units after = units;
      const uint32_t low = after.next();
      if (low >= 0xdc00 && low < 0xe000) {
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        units = after;
      }
    }
    if (code < 0x80) {
      found += char(code);
    } else if (code < 0x800) {
      found += {char(0xc0 | code >> 6), char(0x80 | (code & 63))};
    } else if (code < 0x10000) {
      found += {char(0xe0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
    } else {
      found += {char(0xf0 | code >> 18), char(0x80 | (code >> 12 & 63)), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
    }
  }
  return found;
}

int64_t Json::integer(uint32_t node) const {
  const char *at = source + nodes[node].start, *end = source + nodes[node].stop;
  const bool is_negative = *at == '-';
  int64_t found = 0;
  for (at += is_negative; at < end; at++) {
    if (found > (INT64_MAX - 9) / 10) return is_negative ? INT64_MIN : INT64_MAX;
    found = 10 * found + (*at - '0');
  }
  return is_negative ? -found : found;
}

double Json::real(uint32_t node) const { return to_double(source + nodes[node].start, source + nodes[node].stop); }

Span Json::raw(uint32_t node) const {
  return {(const uint8_t *)source + nodes[node].start, nodes[node].stop - nodes[node].start};
}

Shown Json::shown(uint32_t node) const {
  const Node &one = nodes[node];
  return Shown(source + one.start, one.stop - one.start);
}

bool Json::nests_deeper(uint32_t node, uint32_t most) const {
  List<uint32_t> open(budget);  // the ends of the containers around a node
  for (uint32_t i = node; i < end(node); i++) {
    while (!open.empty() && open.back() <= i) open.pop_back();
    if (open.size() > most) return true;
    if (is(i, Kind::LIST) || is(i, Kind::OBJECT)) open.push_back(end(i));
  }
  return false;
}

}  // namespace muws
