// Values of a tensor from their patterns; values.py is the reference.
#pragma once
#include "manifest.h"

namespace muws {

// Whether the patterns of a tensor are the bits of its values.
inline bool is_plain(const Entry &entry) { return entry.stored == entry.dtype && entry.dtype != INT8 && entry.dtype != UINT8; }

// Turns n patterns into values of the dtype. Refuses an index beyond the palette.
void to_values(const Manifest &manifest, const Entry &entry, const uint8_t *patterns, uint64_t n, uint8_t *out);

// Turns n values of a dtype that is not complex into float32, to the nearest value.
void to_float32(Form dtype, const uint8_t *values, uint64_t n, uint8_t *out);

inline bool has_float32(Form dtype) { return dtype != COMPLEX32 && dtype != COMPLEX64 && dtype != COMPLEX128; }

}  // namespace muws
