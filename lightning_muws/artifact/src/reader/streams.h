// The bytes of a stream from its coded bytes: coders, filters and parts. codecs.py, filters.py and parts.py are the reference.
#pragma once
#include "memory.h"

namespace muws {

// Bytes that memory for a stream of n bytes needs beyond them: rans decodes whole steps.
uint64_t slack(uint64_t n);

// Decodes n bytes into memory of n + slack(n).
void decode_stream(Budget &budget, const char *coder, Span coded, uint8_t *out, uint64_t n);

// Decodes a zlib stream (RFC 1950) of exactly n bytes.
void inflate(Span coded, uint8_t *out, uint64_t n);

// Writes n zeros and ones, the first one from the lowest bit; refuses other bits than 0 after them.
void unpack_bits(const uint8_t *packed, uint64_t n, uint8_t *out, const char *what);

// The SHA-256 in hexadecimal digits (FIPS 180-4).
struct Digest {
  char text[65];
};
Digest sha256(Span data);

}  // namespace muws
