// Reads `.muws` files of format 1.0 and 1.1: written from docs/format.md, with the refusals of the Python reader.
// One module without dependencies, for browsers and node. It runs no code of a file and sends nothing anywhere.
//
//     const file = openMuws(new Uint8Array(await blob.arrayBuffer()));
//     file.tensors.map((tensor) => tensor.name);
//     for (const [name, bytes] of file.decode()) ...

export class FormatError extends Error {}

export const MAX_BYTES = 2 ** 31; // of all tensors together, unless the caller allows more
const MOST = 1 << 24, HALF_MIB = 1 << 19; // bytes of a header or a manifest
const MAX_CHUNK = 1 << 28, MAX_CHUNKS = 1024, MIB = 1 << 20;
const MAX_AXES = 64, MAX_NUMEL = 1n << 60n, MAX_PALETTE = 4096, MAX_DEPTH = 64, MAX_PARTS = 1024, QUICK = 40960;
const FLOATS = { float16: 2, bfloat16: 2, float32: 4, float64: 8 };
const BYTES = ["int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"];
const ITEM = {
  ...FLOATS, bool: 1, uint16: 2, int16: 2, uint32: 4, int32: 4, complex32: 4, uint64: 8, int64: 8, complex64: 8, complex128: 16,
};
for (const name of BYTES) ITEM[name] = 1;
const WIDTHS = { ...FLOATS, grid: 2, palette: 2 }; // of a stored value; the order of the streams in a chunk
for (const name of BYTES) WIDTHS[name] = 1;
const ORDER = ["magnitudes", "free"].flatMap((role) => Object.keys(WIDTHS).map((stored) => `${role}.${stored}`));
export const DENSE = 0, MIXED = 1, PRUNED = 2, POSITIVE = 3, NEGATIVE = 4;
const isUnified = (kind) => kind === MIXED || kind === POSITIVE || kind === NEGATIVE;
const has = (table, key) => Object.hasOwn(table, key);

function refuse(message) {
  throw new FormatError(message);
}

function shown(value) {
  const text = value instanceof Map ? "an object" : value instanceof Real ? value.text : String(value);
  return text.slice(0, 100);
}

// ---- JSON: whole numbers stay apart from others, no key occurs twice, all is ASCII

class Real {
  constructor(text) {
    this.text = text;
    this.value = Number(text);
  }
}

const ESCAPES = { 34: '"', 92: "\\", 47: "/", 98: "\b", 102: "\f", 110: "\n", 114: "\r", 116: "\t" };
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;

class Json {
  constructor(bytes, what) {
    this.what = what;
    if (bytes.some((byte) => byte > 127)) this.bad("it is not ASCII");
    this.text = new TextDecoder("latin1").decode(bytes);
    this.at = 0;
  }

  bad(why) {
    refuse(`the ${this.what} is not JSON that this format allows: ${why}`);
  }

  parse() {
    const found = this.value(0);
    this.space();
    if (this.at < this.text.length) this.bad(`more follows at ${this.at}`);
    if (!(found instanceof Map)) refuse(`the ${this.what} is no JSON object`);
    return found;
  }

  space() {
    while (this.at < this.text.length && " \t\n\r".includes(this.text[this.at])) this.at++;
  }

  skips(mark) {
    this.space();
    if (this.text[this.at] !== mark) return false;
    this.at++;
    return true;
  }

  value(depth) {
    if (depth > 900) this.bad("it nests too deep");
    this.space();
    const mark = this.text[this.at];
    if (mark === "{") return this.object(depth);
    if (mark === "[") return this.list(depth);
    if (mark === '"') return this.string();
    for (const [word, value] of [["true", true], ["false", false], ["null", null]]) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    return this.number();
  }

  object(depth) {
    const found = new Map();
    this.at++;
    if (this.skips("}")) return found;
    do {
      this.space();
      if (this.text[this.at] !== '"') this.bad(`a key is needed at ${this.at}`);
      const key = this.string();
      if (!this.skips(":")) this.bad(`a colon is needed at ${this.at}`);
      if (found.has(key)) this.bad("a key occurs twice");
      found.set(key, this.value(depth + 1));
    } while (this.skips(","));
    if (!this.skips("}")) this.bad(`an object is open at ${this.at}`);
    return found;
  }

  list(depth) {
    const found = [];
    this.at++;
    if (this.skips("]")) return found;
    do found.push(this.value(depth + 1));
    while (this.skips(","));
    if (!this.skips("]")) this.bad(`a list is open at ${this.at}`);
    return found;
  }

  string() {
    const { text } = this;
    let start = ++this.at, found = "";
    for (;; this.at++) {
      const code = text.charCodeAt(this.at);
      if (code === 34) break;
      if (!(code >= 32)) this.bad(`a string is open or has a control character at ${this.at}`);
      if (code !== 92) continue;
      found += text.slice(start, this.at);
      const escape = text.charCodeAt(++this.at);
      if (escape === 117) {
        const digits = text.slice(this.at + 1, this.at + 5);
        if (!/^[0-9a-fA-F]{4}$/.test(digits)) this.bad(`an escape is broken at ${this.at}`);
        found += String.fromCharCode(parseInt(digits, 16));
        this.at += 4;
      } else if (has(ESCAPES, escape)) found += ESCAPES[escape];
      else this.bad(`an escape is broken at ${this.at}`);
      start = this.at + 1;
    }
    found += text.slice(start, this.at++);
    return found;
  }

  number() {
    NUMBER.lastIndex = this.at;
    const found = NUMBER.exec(this.text);
    if (!found) this.bad(`a value is needed at ${this.at}`);
    const [text, fraction, exponent] = found;
    this.at += text.length;
    if (fraction !== undefined || exponent !== undefined) {
      const real = new Real(text);
      if (!Number.isFinite(real.value)) this.bad(`${text.slice(0, 40)} is no number`);
      return real;
    }
    if (text.length > 4300) this.bad("a number has more than 4300 digits");
    return Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);
  }
}

function escaped(text) {
  let found = '"';
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i), c = text[i];
    const short = '"\\\b\f\n\r\t'.indexOf(c);
    if (short >= 0) found += "\\" + '"\\bfnrt'[short];
    else found += code < 32 || code > 126 ? "\\u" + code.toString(16).padStart(4, "0") : c;
  }
  return found + '"';
}

// JSON as the format writes it: no spaces, ASCII, small letters in escapes.
function dumped(value) {
  if (typeof value === "string") return escaped(value);
  if (Array.isArray(value)) return `[${value.map(dumped).join(",")}]`;
  if (value instanceof Map) return `{${[...value].map(([key, inner]) => `${escaped(key)}:${dumped(inner)}`).join(",")}}`;
  return value instanceof Real ? value.text : String(value);
}

// Plain objects and numbers, to show them.
export function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (value instanceof Map) {
    const found = Object.create(null);
    for (const [key, inner] of value) found[key] = plain(inner);
    return found;
  }
  return value instanceof Real ? value.value : typeof value === "bigint" ? value.toString() : value;
}

// Whether something has more than 64 lists and objects around it; does not recurse.
function nestsDeeper(value) {
  let level = [value];
  for (let i = 0; i <= MAX_DEPTH && level.length; i++) {
    const next = [];
    for (const one of level) {
      if (Array.isArray(one)) for (const inner of one) next.push(inner);
      else if (one instanceof Map) for (const inner of one.values()) next.push(inner);
    }
    level = next;
  }
  return level.length > 0;
}

// ---- checksums

const CRC = new Uint32Array(256).map((_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(data) {
  let crc = -1;
  for (let i = 0; i < data.length; i++) crc = CRC[(crc ^ data[i]) & 255] ^ (crc >>> 8);
  return (crc ^ -1) >>> 0;
}

// FIPS 180-4, sections 4.2.2 and 5.3.3: the first bits of the fractions of roots of primes.
const PRIMES = [];
for (let n = 2; PRIMES.length < 64; n++) if (PRIMES.every((p) => n % p)) PRIMES.push(n);
const fraction = (x) => ((x - Math.floor(x)) * 2 ** 32) | 0;
const ROUNDS = PRIMES.map((p) => fraction(Math.cbrt(p)));

function sha256(data) {
  const h = Int32Array.from(PRIMES.slice(0, 8), (p) => fraction(Math.sqrt(p)));
  const padded = new Uint8Array(((data.length + 72) >> 6) << 6);
  padded.set(data);
  padded[data.length] = 128;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 8, Math.floor(data.length / 2 ** 29));
  view.setUint32(padded.length - 4, data.length << 3);
  const w = new Int32Array(64);
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  for (let start = 0; start < padded.length; start += 64) {
    for (let t = 0; t < 16; t++) w[t] = view.getInt32(start + 4 * t);
    for (let t = 16; t < 64; t++) {
      const a = w[t - 15], b = w[t - 2];
      const s0 = turn(a, 7) ^ turn(a, 18) ^ (a >>> 3), s1 = turn(b, 17) ^ turn(b, 19) ^ (b >>> 10);
      w[t] = (w[t - 16] + s0 + w[t - 7] + s1) | 0;
    }
    let [a, b, c, d, e, f, g, last] = h;
    for (let t = 0; t < 64; t++) {
      const s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
      const one = (last + s1 + ((e & f) ^ (~e & g)) + ROUNDS[t] + w[t]) | 0;
      const s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
      const two = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [last, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
    }
    [a, b, c, d, e, f, g, last].forEach((value, i) => (h[i] += value));
  }
  return [...h].map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
}

// ---- zlib (RFC 1950 and 1951)

const LENGTHS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_BITS = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCES = [
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289,
  16385, 24577,
];
const DISTANCE_BITS = DISTANCES.map((_, i) => Math.max(0, (i >> 1) - 1));
const CODE_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
const broken = () => refuse("a zlib stream is broken");

// A table from the next 15 bits, the first one lowest, to 16 * symbol + length of its code; 0 where there is no code.
function huffman(lengths, mayBeOne) {
  const counts = new Uint16Array(16);
  for (const n of lengths) counts[n]++;
  counts[0] = 0;
  let left = 1, longest = 0;
  for (let n = 1; n < 16; n++) {
    left = 2 * left - counts[n];
    if (left < 0) broken();
    if (counts[n]) longest = n;
  }
  if (left > 0 && longest > 0 && !(mayBeOne && longest === 1)) broken();
  const next = new Uint16Array(16);
  for (let n = 1, code = 0; n < 16; n++) next[n] = code = (code + counts[n - 1]) << 1;
  const bits = Math.max(1, longest), table = new Uint16Array(1 << bits);
  lengths.forEach((n, symbol) => {
    if (!n) return;
    let code = next[n]++, turned = 0;
    for (let i = 0; i < n; i++, code >>= 1) turned = (turned << 1) | (code & 1);
    for (; turned < table.length; turned += 1 << n) table[turned] = (symbol << 4) | n;
  });
  return { table, mask: table.length - 1 };
}

const FIXED = [0, 1].map((i) =>
  huffman(i ? new Array(32).fill(5) : Array.from({ length: 288 }, (_, s) => (s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8)), true),
);

class Inflate {
  constructor(coded, most) {
    this.coded = coded;
    this.most = most;
    this.at = 2;
    this.hold = 0;
    this.n = 0;
    this.out = new Uint8Array(Math.min(most, Math.max(1024, 4 * coded.length)));
    this.size = 0;
    const head = coded.length < 6 ? 1 : (coded[0] << 8) | coded[1];
    if (head % 31 || (coded[0] & 15) !== 8 || coded[0] >> 4 > 7 || coded[1] & 32) broken();
  }

  need(n) {
    while (this.n < n) {
      if (this.at >= this.coded.length) broken();
      this.hold |= this.coded[this.at++] << this.n;
      this.n += 8;
    }
  }

  bits(n) {
    if (!n) return 0;
    this.need(n);
    const found = this.hold & ((1 << n) - 1);
    this.hold >>>= n;
    this.n -= n;
    return found;
  }

  symbol({ table, mask }) {
    for (;;) {
      const entry = table[this.hold & mask], n = entry & 15;
      if (n && n <= this.n) {
        this.hold >>>= n;
        this.n -= n;
        return entry >> 4;
      }
      if (this.n > 15) broken(); // no code begins like this
      this.need(this.n + 1);
    }
  }

  room(n) {
    if (this.size + n > this.most) refuse(`a zlib stream does not hold the ${this.most} bytes that are needed`);
    if (this.size + n > this.out.length) {
      const larger = new Uint8Array(Math.min(this.most, 2 * (this.size + n)));
      larger.set(this.out.subarray(0, this.size));
      this.out = larger;
    }
  }

  stored() {
    this.hold = 0;
    this.at -= this.n >> 3; // whole bytes that were read too early
    this.n = 0;
    const n = this.bits(16), complement = this.bits(16);
    if (n !== (complement ^ 0xffff) || this.at + n > this.coded.length) broken();
    this.room(n);
    this.out.set(this.coded.subarray(this.at, this.at + n), this.size);
    this.at += n;
    this.size += n;
  }

  tables() {
    const nLengths = this.bits(5) + 257, nDistances = this.bits(5) + 1, nCodes = this.bits(4) + 4;
    if (nLengths > 286 || nDistances > 30) broken();
    const codes = new Array(19).fill(0);
    for (let i = 0; i < nCodes; i++) codes[CODE_ORDER[i]] = this.bits(3);
    const code = huffman(codes, false);
    const lengths = [];
    while (lengths.length < nLengths + nDistances) {
      const symbol = this.symbol(code);
      if (symbol < 16) lengths.push(symbol);
      else {
        if (symbol === 16 && !lengths.length) broken();
        const value = symbol === 16 ? lengths[lengths.length - 1] : 0;
        let times = symbol === 16 ? 3 + this.bits(2) : symbol === 17 ? 3 + this.bits(3) : 11 + this.bits(7);
        if (lengths.length + times > nLengths + nDistances) broken();
        while (times--) lengths.push(value);
      }
    }
    if (!lengths[256]) broken();
    return [huffman(lengths.slice(0, nLengths), true), huffman(lengths.slice(nLengths), true)];
  }

  block([literals, distances]) {
    for (;;) {
      const symbol = this.symbol(literals);
      if (symbol === 256) return;
      if (symbol < 256) {
        if (this.size >= this.out.length) this.room(1);
        this.out[this.size++] = symbol;
        continue;
      }
      if (symbol > 285) broken();
      const n = LENGTHS[symbol - 257] + this.bits(LENGTH_BITS[symbol - 257]);
      const far = this.symbol(distances);
      if (far > 29) broken();
      const distance = DISTANCES[far] + this.bits(DISTANCE_BITS[far]);
      if (distance > this.size) broken();
      this.room(n);
      const { out } = this;
      for (let i = 0; i < n; i++, this.size++) out[this.size] = out[this.size - distance];
    }
  }

  run() {
    let isLast = 0;
    while (!isLast) {
      isLast = this.bits(1);
      const kind = this.bits(2);
      if (kind === 0) this.stored();
      else if (kind === 1) this.block(FIXED);
      else if (kind === 2) this.block(this.tables());
      else broken();
    }
    const { coded } = this, at = this.at - (this.n >> 3), out = this.out.subarray(0, this.size);
    if (at + 4 > coded.length) broken();
    if (at + 4 < coded.length) refuse("a zlib stream is followed by other bytes");
    let a = 1, b = 0;
    for (let i = 0; i < out.length; ) {
      for (const stop = Math.min(out.length, i + 3800); i < stop; i++) b += a += out[i];
      a %= 65521;
      b %= 65521;
    }
    const checksum = ((coded[at] << 24) | (coded[at + 1] << 16) | (coded[at + 2] << 8) | coded[at + 3]) >>> 0;
    if (checksum !== b * 65536 + a) broken();
    return out;
  }
}

function inflate(coded, n) {
  const found = new Inflate(coded, n).run();
  if (found.length !== n) refuse(`a zlib stream does not hold the ${n} bytes that are needed`);
  return found;
}

// ---- rans, filters and parts

class Cursor {
  constructor(coded, what) {
    this.coded = coded;
    this.what = what;
    this.at = 0;
  }

  byte() {
    if (this.at >= this.coded.length) refuse(`a stream ends within ${this.what}`);
    return this.coded[this.at++];
  }

  number() {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      const byte = this.byte();
      if (byte < 128 || shift === 21) return value + byte * 2 ** shift;
      value += (byte & 127) * 2 ** shift;
    }
  }

  take(n) {
    if (n > this.coded.length - this.at) refuse(`a stream ends within ${this.what}`);
    this.at += n;
    return this.coded.subarray(this.at - n, this.at);
  }
}

function lanesOf(n) {
  return Math.max(1, Math.min(8192, Math.floor(n / 2048)));
}

function lengthsOf(cursor, count, whole, why) {
  const found = [];
  let rest = whole;
  for (let i = 1; i < count; i++) {
    const n = cursor.number();
    found.push(n);
    rest -= n;
  }
  found.push(rest);
  if (found.some((n) => n < 1)) refuse(why);
  return found;
}

function ransTable(cursor) {
  const first = cursor.byte(), last = cursor.byte(), symbols = [], frequencies = [], starts = [];
  let sum = 0;
  for (let symbol = first; symbol <= last; symbol++) {
    const f = cursor.number();
    if (f) {
      symbols.push(symbol);
      frequencies.push(f);
      starts.push(sum);
    }
    sum += f;
  }
  if (sum !== 4096) refuse(`the frequencies of a rans stream sum to ${sum}, they have to sum to 4096`);
  return { symbols, frequencies, starts };
}

function rans(coded, n) {
  const lanes = lanesOf(n), steps = Math.ceil(n / lanes), cursor = new Cursor(coded, "the tables of rans");
  const nTables = cursor.number();
  if (nTables < 1 || nTables > Math.min(steps, 1024)) refuse(`a rans stream of ${steps} steps declares ${nTables} tables`);
  const lengths = lengthsOf(cursor, nTables, steps, `the tables of a rans stream are not for its ${steps} steps`);
  const tables = lengths.map(() => ransTable(cursor));
  let at = cursor.at + 4 * lanes;
  if (coded.length < at || (coded.length - at) % 2) refuse("a rans stream ends within its states");
  const view = new DataView(coded.buffer, coded.byteOffset, coded.length);
  const x = new Float64Array(lanes), out = new Uint8Array(steps * lanes);
  for (let i = 0; i < lanes; i++) x[i] = view.getUint32(cursor.at + 4 * i, true);
  const index = new Uint8Array(4096), end = coded.length;
  let k = 0;
  lengths.forEach((length, t) => {
    const { symbols, frequencies, starts } = tables[t], isLong = length * lanes >= 4096;
    if (isLong) symbols.forEach((_, i) => index.fill(i, starts[i], starts[i] + frequencies[i]));
    for (const stop = k + length * lanes; k < stop; ) {
      for (let lane = 0; lane < lanes; lane++) {
        const state = x[lane], slot = state % 4096;
        let i = isLong ? index[slot] : 0;
        if (!isLong) {
          for (let high = symbols.length; i + 1 < high; ) {
            const middle = (i + high) >> 1;
            if (starts[middle] <= slot) i = middle;
            else high = middle;
          }
        }
        out[k++] = symbols[i];
        let next = frequencies[i] * Math.floor(state / 4096) + slot - starts[i];
        if (next < 65536) {
          if (at >= end) refuse("a rans stream ends too early");
          next = next * 65536 + coded[at] + 256 * coded[at + 1];
          at += 2;
        }
        x[lane] = next;
      }
    }
  });
  if (at !== end || x.some((state) => state !== 65536)) refuse("a rans stream does not end where it should");
  return out.subarray(0, n);
}

const FILTERS = {
  repeat: {
    nNumbers: 3,
    length(n, [row, rows, cols]) {
      if (!row || n % row || rows < 1 || rows > n / row || cols < 1 || cols > row)
        refuse(`${n} bytes cannot repeat ${rows} rows of ${row} and ${cols} columns`);
      return Math.ceil(n / row / rows) * Math.ceil(row / cols);
    },
    undo(data, n, [row, rows, cols]) {
      const out = new Uint8Array(n), across = Math.ceil(row / cols);
      for (let i = 0, k = 0; k < n; i++) {
        if (i % rows) {
          out.copyWithin(k, k - row, k); // as the row before
          k += row;
          continue;
        }
        const from = (i / rows) * across;
        for (let j = 0; j < across; j++) {
          const times = Math.min(cols, row - j * cols);
          if (times < 8) for (let c = 0; c < times; c++) out[k + c] = data[from + j];
          else out.fill(data[from + j], k, k + times);
          k += times;
        }
      }
      return out;
    },
  },
  xor: {
    nNumbers: 1,
    length(n, [distance]) {
      if (distance < 1 || distance >= n)
        refuse(`${n} bytes are XOR those ${distance} places before, which is no distance within them`);
      return n;
    },
    undo(data, n, [distance]) {
      const out = data.slice();
      for (let i = distance; i < n; i++) out[i] ^= out[i - distance];
      return out;
    },
  },
  delta: {
    nNumbers: 0,
    length: (n) => n,
    undo(data, n) {
      const out = data.slice();
      for (let i = 1; i < n; i++) out[i] += out[i - 1];
      return out;
    },
  },
  bits: { nNumbers: 0, length: (n) => Math.ceil(n / 8), undo: (data, n) => unpackBits(data, n, "the last bits of a stream") },
};

function unpackBits(data, n, what) {
  if (n % 8 && data[data.length - 1] >> n % 8) refuse(`${what} are followed by others than zeros`);
  const out = new Uint8Array(n);
  for (let i = 0; i < n; i++) out[i] = (data[i >> 3] >> (i & 7)) & 1;
  return out;
}

const CODERS = {
  raw: (coded) => coded,
  zlib: inflate,
  rans,
  zlib2: (coded, n) => inflate(new Inflate(coded, n + 1).run(), n),
};

function decodeCoder(name, coded, n) {
  const filters = name.split("-"), inner = filters.pop(), names = Object.keys(FILTERS);
  const places = filters.map((filter) => names.indexOf(filter));
  const isKnown = has(CODERS, inner) && (filters.length || inner !== "zlib2");
  if (!isKnown || places.some((place, i) => place < 0 || (i && place <= places[i - 1])))
    refuse(`coder '${name.slice(0, 60)}' is not known to this reader`);
  const cursor = new Cursor(coded, `the numbers of ${name}`), undo = [];
  for (const filter of filters) {
    const numbers = Array.from({ length: FILTERS[filter].nNumbers }, () => cursor.number());
    undo.push([filter, n, numbers]);
    n = FILTERS[filter].length(n, numbers);
  }
  let data = CODERS[inner](coded.subarray(cursor.at), n);
  if (data.length !== n) refuse(`a ${name} stream holds ${data.length} bytes, ${n} are needed`);
  for (const [filter, length, numbers] of undo.reverse()) data = FILTERS[filter].undo(data, length, numbers);
  return data;
}

function decodeStream(name, coded, n) {
  if (name !== "parts") return decodeCoder(name, coded, n);
  const cursor = new Cursor(coded, "the head of its parts"), count = cursor.number();
  const most = Math.min(MAX_PARTS, 1 + Math.floor(n / 1024));
  if (count < 1 || count > most) refuse(`a stream of ${n} bytes has ${count} parts, 1 to ${most} are allowed`);
  const lengths = lengthsOf(cursor, count, n, `the parts of a stream are not for its ${n} bytes`);
  const coders = lengths.map((length) => {
    const coder = String.fromCharCode(...cursor.take(cursor.byte()));
    const filters = coder.split("-");
    if (filters.pop() === "rans" && length < QUICK && !filters.includes("bits"))
      refuse(`a part of ${length} bytes is coded by ${coder}, which only parts of ${QUICK} bytes and more may be`);
    return [coder, cursor.number()];
  });
  const data = new Uint8Array(n);
  let at = 0;
  coders.forEach(([coder, nCoded], i) => {
    data.set(decodeCoder(coder, cursor.take(nCoded), lengths[i]), at);
    at += lengths[i];
  });
  if (cursor.at !== coded.length) refuse("a stream goes on after its last part");
  return data;
}

// ---- the manifest

function get(fields, key, kind, usual) {
  const value = fields.has(key) ? fields.get(key) : usual;
  if (!KIND_OF[kind](value)) refuse(`${key} is '${shown(value)}', a ${kind} is needed`);
  return value instanceof Real ? value.value : value;
}

const KIND_OF = {
  string: (x) => typeof x === "string",
  integer: (x) => typeof x === "number" || typeof x === "bigint",
  float: (x) => x instanceof Real,
  boolean: (x) => typeof x === "boolean",
  list: Array.isArray,
  object: (x) => x instanceof Map,
};
const ZERO = new Real("0.0");

function integers(fields, key, length) {
  const found = get(fields, key, "list");
  const isWhole = (n) => KIND_OF.integer(n) && n >= 0 && BigInt(n) < MAX_NUMEL;
  if ((length !== null && found.length !== length) || !found.every(isWhole))
    refuse(`${key} is ${shown(found)}, whole numbers >= 0 are needed`);
  return found;
}

// Sizes are exact up to 2**53; whatever is larger is refused for its bytes.
const product = (sizes) => sizes.reduce((a, b) => a * Number(b), 1);

function tensorOf(fields, before) {
  const name = get(fields, "name", "string"), dtype = get(fields, "dtype", "string"), shape = integers(fields, "shape", null);
  if (!has(ITEM, dtype)) refuse(`'${name}' has dtype '${shown(dtype)}', which this reader does not know`);
  if (shape.length > MAX_AXES) refuse(`'${name}' has ${shape.length} axes, at most ${MAX_AXES} can be stored`);
  if (shape.reduce((a, n) => a * BigInt(n || 1), 1n) >= MAX_NUMEL) refuse(`'${name}' has more weights than any memory holds`);
  const entry = {
    name, dtype, shape, numel: product(shape), form: null, block: null, outAxis: 0, groups: 1, counts: [0, 0, 0], error: 0,
    sameAs: null, isCopy: false,
  };
  entry.nBytes = entry.numel * ITEM[dtype];
  entry.matrix = [entry.numel, 1];
  if (fields.has("same_as")) {
    entry.isCopy = get(fields, "copy", "boolean", false);
    entry.sameAs = get(fields, "same_as", "integer");
    const other = before[entry.sameAs];
    if (!other || other.sameAs !== null || String(other.shape) !== String(shape) || other.dtype !== dtype)
      refuse(`'${name}' has same_as=${entry.sameAs}, but that tensor is missing, itself shared, or has another shape or dtype`);
    return entry;
  }
  entry.form = formOf(fields, name, dtype);
  if (fields.has("block")) addBlocks(entry, fields);
  entry.error = get(fields, "error", "float", ZERO);
  if (!(entry.error >= 0)) refuse(`'${name}' has an error of ${entry.error}, a finite number >= 0 is needed`);
  return entry;
}

function addBlocks(entry, fields) {
  const { name, dtype, shape } = entry;
  if (!entry.form) refuse(`'${name}' is of dtype ${dtype} and in blocks, which only floating tensors are, and bytes`);
  const block = integers(fields, "block", 2).map(Number), groups = Number(get(fields, "groups", "integer", 1));
  const outAxis = get(fields, "out_axis", "integer", 0), first = Number(shape[0] ?? 1);
  const fits = shape.length >= 2 && (outAxis === 0 || outAxis === 1) && groups >= 1 && groups <= Math.max(1, first);
  if (!fits || first % groups || (groups > 1 && outAxis === 0))
    refuse(`'${name}' of shape ${shown(shape)} cannot have out_axis=${outAxis}, groups=${groups}`);
  if (!block.every((n) => n >= 1)) refuse(`'${name}': block_shape=(${block}) is not allowed: two whole numbers >= 1 are`);
  const nOut = outAxis ? Number(shape[1]) * groups : first;
  Object.assign(entry, { block, groups, outAxis, matrix: [nOut, nOut ? Math.floor(entry.numel / nOut) : 0] });
  entry.counts = integers(fields, "kinds", 3).map(Number);
  entry.grid = [Math.floor(entry.matrix[0] / block[0]), Math.floor(entry.matrix[1] / block[1])];
  const n = entry.grid[0] * entry.grid[1], declared = entry.counts.reduce((a, b) => a + b);
  if (declared !== n) refuse(`'${name}' of shape ${shown(shape)} has ${n} blocks, the file declares ${declared}`);
}

function formOf(fields, name, dtype) {
  const stored = get(fields, "stored", "string", dtype), step = get(fields, "step", "float", ZERO);
  if (!has(FLOATS, dtype)) {
    if (stored !== dtype || step) refuse(`'${name}' is of dtype ${dtype} and stored as '${shown(stored)}'`);
    return BYTES.includes(dtype) && fields.has("block") ? { stored, step: 0 } : null;
  }
  if (stored === "palette") return { stored, step: 0, palette: paletteOf(get(fields, "palette", "string"), name, ITEM[dtype]) };
  const isKnown = has(FLOATS, stored) || stored === "grid";
  if (!isKnown || (stored === "grid") !== (step !== 0) || !(step >= 0) || (dtype !== "float64" && Math.fround(step) !== step))
    refuse(`'${name}' is stored as '${shown(stored)}' with step ${step}, which this format does not allow`);
  return { stored, step };
}

// The patterns of the magnitudes, 0 first, as bytes.
function paletteOf(text, name, width) {
  const pairs = text.length <= 4 * MAX_PALETTE * width ? text.replace(/[ \t\n\r\f\v]+/g, " ").match(/ |[^ ]{1,2}/g) ?? [] : [];
  const raw = pairs.filter((pair) => pair !== " ").map((pair) => (/^[0-9a-fA-F]{2}$/.test(pair) ? parseInt(pair, 16) : NaN));
  const n = raw.length / width;
  const isSigned = (_, i) => i % width === width - 1 && raw[i] > 127;
  if (!Number.isInteger(n) || n < 1 || n > MAX_PALETTE || raw.some(Number.isNaN) || raw.some(isSigned))
    refuse(`'${name}' has the palette '${shown(text)}', 1 to ${MAX_PALETTE} magnitudes of ${width} bytes in hex are needed`);
  return Uint8Array.from([...new Array(width).fill(0), ...raw]);
}

function chunkOf(fields) {
  const until = integers(fields, "until", 2).map(Number), streams = new Map();
  for (const [name, stream] of get(fields, "streams", "object")) {
    const [coder, checksum] = Array.isArray(stream) && stream.length === 2 ? stream : [];
    if (typeof coder !== "string" || !KIND_OF.integer(checksum)) refuse(`stream '${shown(name)}' has neither coder nor checksum`);
    streams.set(name, { coder, checksum });
  }
  return { until, streams, pieces: [] };
}

const pieceBytes = ({ entry, start, stop }) => (stop - start) * entry.matrix[1] * ITEM[entry.dtype];
const blocksOf = ({ entry, start, stop }) => (entry.block ? Math.floor((stop - start) / entry.block[0]) * entry.grid[1] : 0);
const blockNumel = ({ entry }) => (entry.block ? entry.block[0] * entry.block[1] : 0);
const edgeOf = (piece) => (piece.stop - piece.start) * piece.entry.matrix[1] - blocksOf(piece) * blockNumel(piece);

function checkChunks(tensors, chunks, nBytes) {
  const n = tensors.length, most = MAX_CHUNKS + Math.floor(nBytes / MIB);
  if (chunks.length > most) refuse(`the file has ${chunks.length} chunks, at most ${most} are allowed for its tensors`);
  let [lastAt, lastUnit] = [0, 0];
  for (const { until: [at, unit] } of chunks) {
    const isWhole = at <= n && (unit === 0 || (at < n && tensors[at].sameAs === null));
    if (!isWhole || at < lastAt || (at === lastAt && unit <= lastUnit))
      refuse(`a chunk ends at tensor ${at}, unit ${unit}, which is not after ${lastAt}, ${lastUnit} and within ${n}`);
    if (unit && (unit >= tensors[at].matrix[0] || unit % (tensors[at].block?.[0] ?? 1)))
      refuse(`a chunk ends within ${tensors[at].name}, at ${unit}, where no block row does`);
    [lastAt, lastUnit] = [at, unit];
  }
  if (lastAt !== n || lastUnit !== 0) refuse(`the chunks end at tensor ${lastAt} of ${n}`);
  let at = 0, unit = 0;
  for (const chunk of chunks) {
    const [last, stop] = chunk.until;
    let size = 0;
    while (at < last || (at === last && unit < stop)) {
      const entry = tensors[at], end = at === last ? stop : entry.matrix[0];
      if (entry.sameAs === null && end > unit) {
        const piece = { entry, start: unit, stop: end };
        chunk.pieces.push(piece);
        size += pieceBytes(piece);
      }
      [at, unit] = at === last ? [at, end] : [at + 1, 0];
    }
    if (size > MAX_CHUNK) refuse(`a chunk has ${size} bytes, at most ${MAX_CHUNK} are allowed`);
  }
}

// ---- the frame

const STARTS = [[[80, 75], "a zip archive, such as torch.save writes"], [[128], "a pickle"], [[31, 139], "a gzip file"]];

function frameOf(bytes) {
  const n = bytes.length, view = new DataView(bytes.buffer, bytes.byteOffset, n);
  const length = n < 8 ? 0 : view.getUint32(0, true) + 2 ** 32 * view.getUint32(4, true);
  if (length < 2 || length > n - 8) {
    const kind = STARTS.find(([start]) => start.every((byte, i) => bytes[i] === byte));
    refuse(`this is no .muws file, or one cut short, of ${n} bytes${kind ? `: it begins like ${kind[1]}` : ""}`);
  }
  const largest = Math.min(MOST, HALF_MIB + Math.floor(n / 8));
  if (length > largest) refuse(`the header has ${length} bytes, at most ${largest} are allowed`);
  const base = 8 + length, raw = bytes.subarray(8, base), header = new Json(raw, "header").parse();
  let end = raw.length;
  while (end && raw[end - 1] === 32) end--;
  const canonical = dumped(header);
  if (canonical !== new TextDecoder("latin1").decode(raw.subarray(0, end)))
    refuse("the header is not written as this format writes it");
  const metadata = header.get("__metadata__");
  header.delete("__metadata__");
  const version = versionOf(metadata), spans = spansOf(header, base, n);
  const manifest = manifestOf(bytes, metadata, spans);
  if (manifest.get("version") !== version)
    refuse(`the header has version ${version}, the manifest '${shown(manifest.get("version"))}'`);
  return { version, spans, manifest };
}

function versionOf(metadata) {
  if (!(metadata instanceof Map) || metadata.get("format") !== "muws")
    refuse("this is no .muws file: its header does not name the format");
  const version = metadata.get("version");
  if (typeof version !== "string" || !/^[0-9]+\.[0-9]+$/.test(version)) refuse(`version '${shown(version)}' is no version such as 1.0`);
  if (!version.startsWith("1.")) refuse(`the file has version ${version}, this reader knows 1.1`);
  const keys = [...metadata.keys()].sort().join();
  if ((version === "1.0" || version === "1.1") && keys !== "format,manifest_bytes,manifest_sha256,version")
    refuse(`the header has ${keys.slice(0, 100)}, which version ${version} does not allow`);
  return version;
}

function spansOf(header, base, nBytes) {
  const spans = new Map();
  let end = 0;
  for (const [name, entry] of header) {
    const offsets = entry instanceof Map ? entry.get("data_offsets") : null;
    if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(Number.isInteger))
      refuse(`stream '${shown(name)}' has no valid data_offsets`);
    const [start, stop] = offsets, shape = entry.get("shape");
    const isRight = entry.size === 3 && entry.get("dtype") === "U8" && Array.isArray(shape) && shape.length === 1;
    if (start !== end || !(stop >= start) || !isRight || shape[0] !== stop - start)
      refuse(`stream '${shown(name)}' should be U8 data at offset ${end}`);
    spans.set(name, [base + start, base + stop]);
    end = stop;
  }
  if (base + end !== nBytes) refuse(`the header declares ${base + end} bytes, the file has ${nBytes}`);
  return spans;
}

function manifestOf(bytes, metadata, spans) {
  const declared = metadata.get("manifest_bytes");
  if (!spans.has("manifest") || typeof declared !== "string" || !/^[0-9]{1,10}$/.test(declared)) refuse("the file has no manifest");
  let raw = bytes.subarray(...spans.get("manifest"));
  const n = Number(declared), most = Math.min(MOST, HALF_MIB + Math.floor(bytes.length / 8) + 128 * raw.length);
  if (Math.max(n, raw.length) > most) refuse(`the manifest has ${Math.max(n, raw.length)} bytes, at most ${most} are allowed`);
  if (raw.length !== n) raw = inflate(raw, n);
  if (sha256(raw) !== metadata.get("manifest_sha256"))
    refuse("the manifest has another SHA-256 than the header declares: the file is damaged");
  return new Json(raw, "manifest").parse();
}

// ---- tensors from streams

// The three kinds of each byte from 0 to 124.
const TRIPLES = Uint8Array.from({ length: 375 }, (_, i) => Math.floor(Math.floor(i / 3) / 5 ** (i % 3)) % 5);

function unpackKinds(packed, n) {
  const kinds = new Uint8Array(3 * packed.length);
  for (let i = 0, k = 0; i < packed.length; i++) {
    const at = 3 * packed[i];
    if (at >= 375) refuse(`${packed[i]} stands for no kinds of blocks, only numbers below 125 do`);
    kinds[k++] = TRIPLES[at];
    kinds[k++] = TRIPLES[at + 1];
    kinds[k++] = TRIPLES[at + 2];
  }
  if (kinds.subarray(n).some((kind) => kind)) refuse("the last kinds of blocks are followed by others than zeros");
  return kinds.subarray(0, n);
}

// Values of a chunk: words of 1, 2 or 4 bytes; of 8 bytes as pairs of words of 4.
function valuesOf(name, n, read) {
  const width = WIDTHS[name.split(".")[1]], raw = new Uint8Array(n * width);
  for (let i = 0; i < width; i++) {
    const plane = read(`${name}.${i}`, n);
    if (plane) for (let k = 0, at = i; k < n; k++, at += width) raw[at] = plane[k];
  }
  const u = wordsOf(raw, width);
  if (width === 8) {
    for (let k = 0; k < u.length; k += 2) {
      const low = u[k], high = u[k + 1];
      u[k] = (low >>> 1) | (high << 31);
      u[k + 1] = (high >>> 1) | (low << 31);
    }
  } else {
    const top = 8 * width - 1;
    for (let k = 0; k < u.length; k++) u[k] = (u[k] >>> 1) | (u[k] << top);
  }
  return u;
}

const IS_LITTLE = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

function wordsOf(raw, width) {
  if (!IS_LITTLE) throw new Error("this machine stores the highest byte first, which is not supported");
  const Words = width === 1 ? Uint8Array : width === 2 ? Uint16Array : Uint32Array;
  return new Words(raw.buffer, raw.byteOffset, raw.length / Words.BYTES_PER_ELEMENT);
}

// Turns patterns into the bytes of a dtype.
const f64 = new Float64Array(1), f32 = new Float32Array(f64.buffer, 0, 1), u32 = new Uint32Array(f64.buffer);

function fromHalf(u) {
  const sign = u >> 15 ? -1 : 1, exponent = (u >> 10) & 31, mantissa = u & 1023;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + mantissa / 1024) : 2 ** -24 * mantissa);
}

function toHalf(x) {
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0, size = Math.abs(x);
  if (size !== size) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00; // half a step above the largest
  const exponent = Math.max(-14, Math.floor(Math.log2(size || 2 ** -14)));
  let e = 2 ** exponent > size ? Math.max(-14, exponent - 1) : 2 ** (exponent + 1) <= size ? exponent + 1 : exponent;
  const steps = even(size / 2 ** (e - 10));
  return sign | (size < 2 ** -14 ? steps : ((e + 15) << 10) + steps - 1024);
}

function even(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2) ? low + 1 : low;
}

function toBrain(x) {
  f32[0] = x;
  if (x !== x) return 0x7fc0;
  const bits = u32[0];
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

const READ = {
  float16: (u, k) => fromHalf(u[k]),
  bfloat16: (u, k) => ((u32[0] = u[k] << 16), f32[0]),
  float32: (u, k) => ((u32[0] = u[k]), f32[0]),
  float64: (u, k) => ((u32[0] = u[2 * k]), (u32[1] = u[2 * k + 1]), f64[0]),
};
const WRITE = {
  float16: (out, k, x) => (out[k] = toHalf(x)),
  bfloat16: (out, k, x) => (out[k] = toBrain(x)),
  float32: (out, k, x) => ((f32[0] = x), (out[k] = u32[0])),
  float64: (out, k, x) => ((f64[0] = x), (out[2 * k] = u32[0]), (out[2 * k + 1] = u32[1])),
};

function convert(entry, u, n) {
  const { dtype, form: { stored, step, palette } } = entry, width = ITEM[dtype];
  if (stored === dtype && dtype !== "int8" && dtype !== "uint8") return new Uint8Array(u.buffer, u.byteOffset, n * width);
  const raw = new Uint8Array(n * width);
  if (stored === "palette") return paletteBytes(entry, u, n, raw, palette);
  const out = wordsOf(raw, width);
  if (stored === "int8" || stored === "uint8") {
    const zero = stored === "uint8" ? 128 : 0;
    for (let k = 0; k < n; k++) out[k] = (u[k] === 128 ? 128 : u[k] > 128 ? 128 - u[k] : u[k]) ^ zero;
    return raw;
  }
  const write = WRITE[dtype], round = dtype === "float64" ? (x) => x : Math.fround;
  const read = stored === "grid" ? (v, k) => (v[k] >> 15 ? -1 : 1) * round((v[k] & 32767) * step) : READ[stored];
  for (let k = 0; k < n; k++) write(out, k, read(u, k));
  return raw;
}

function paletteBytes(entry, u, n, raw, palette) {
  const width = ITEM[entry.dtype], most = palette.length / width;
  for (let k = 0, at = 0; k < n; k++, at += width) {
    const index = u[k] & 32767;
    if (index >= most) refuse(`a value has index ${index} of a palette of ${most - 1} magnitudes`);
    for (let i = 0; i < width; i++) raw[at + i] = palette[index * width + i];
    if (u[k] >> 15) raw[at + width - 1] |= 128;
  }
  return raw;
}

class ChunkReader {
  constructor(chunk, kinds, read) {
    const needed = new Map(ORDER.map((name) => [name, 0]));
    const more = (name, n) => needed.set(name, needed.get(name) + n);
    let at = 0, nSigns = 0, nOther = 0;
    for (const piece of chunk.pieces) {
      const { form } = piece.entry, n = blocksOf(piece), numel = blockNumel(piece);
      if (!form) {
        nOther += pieceBytes(piece);
        continue;
      }
      let dense = 0, mixed = 0, unified = 0;
      for (const stop = at + n; at < stop; at++) {
        if (kinds[at] === DENSE) dense++;
        else if (kinds[at] === MIXED) mixed++;
        if (isUnified(kinds[at])) unified++;
      }
      nSigns += mixed * numel;
      more(`magnitudes.${form.stored}`, unified);
      more(`free.${form.stored}`, dense * numel + edgeOf(piece));
    }
    const nBytes = Math.ceil(nSigns / 8), signs = read("signs", nBytes) ?? new Uint8Array(nBytes);
    if (nSigns % 8 && signs[nBytes - 1] >> nSigns % 8) refuse("the last signs are followed by others than zeros");
    this.kinds = kinds;
    this.signs = signs;
    this.values = new Map();
    for (const [name, n] of needed) if (n) this.values.set(name, valuesOf(name, n, read));
    this.other = read("other", nOther) ?? new Uint8Array(nOther);
    this.at = new Map();
  }

  from(name, n) {
    const start = this.at.get(name) ?? 0;
    this.at.set(name, start + n);
    return start;
  }

  // The bytes of the next piece.
  bytes(piece) {
    const { entry } = piece, n = (piece.stop - piece.start) * entry.matrix[1];
    if (!entry.form) return this.others(piece, n);
    const { stored } = entry.form, words = WIDTHS[stored] === 8 ? 2 : 1;
    if (entry.block) return convert(entry, this.blocks(piece, n, words), n);
    const start = this.from(`free.${stored}`, n);
    return convert(entry, this.values.get(`free.${stored}`).slice(words * start, words * (start + n)), n);
  }

  others({ entry }, n) {
    const width = ITEM[entry.dtype], out = new Uint8Array(n * width), start = this.from("other", n * width);
    for (let i = 0; i < width; i++)
      for (let k = 0, from = start + i * n; k < n; k++) out[k * width + i] = this.other[from + k];
    if (entry.dtype === "bool" && out.some((byte) => byte > 1)) refuse(`${entry.name} has a bool above 1, only 0 and 1 are allowed`);
    return out;
  }

  blocks(piece, n, words) {
    const { entry } = piece, { stored } = entry.form, [r, c] = entry.block, cols = entry.matrix[1], rows = piece.stop - piece.start;
    const width = WIDTHS[stored], u = wordsOf(new Uint8Array(n * width), width), none = new Uint8Array(0);
    const free = this.values.get(`free.${stored}`) ?? none, magnitudes = this.values.get(`magnitudes.${stored}`) ?? none;
    const sign = width === 1 ? 128 : width === 2 ? 0x8000 : 0x80000000, { kinds, signs } = this, top = words - 1;
    let f = this.at.get(`free.${stored}`) ?? 0, m = this.at.get(`magnitudes.${stored}`) ?? 0, s = this.at.get("signs") ?? 0;
    let b = this.from("kinds", blocksOf(piece));
    const across = Math.floor(cols / c), down = Math.floor(rows / r);
    const copyFree = (at, count) => {
      if (count < 16) for (let k = 0; k < words * count; k++) u[words * at + k] = free[words * f + k];
      else u.set(free.subarray(words * f, words * (f + count)), words * at);
      f += count;
    };
    for (let i = 0; i < down; i++) {
      for (let j = 0; j < across; j++) {
        const kind = kinds[b++], corner = i * r * cols + j * c;
        if (kind === PRUNED) continue;
        if (kind === DENSE) {
          for (let y = 0; y < r; y++) copyFree(corner + y * cols, c);
          continue;
        }
        const low = magnitudes[words * m], high = magnitudes[words * m + top];
        m++;
        for (let y = 0; y < r; y++) {
          for (let x = 0, at = words * (corner + y * cols); x < c; x++, at += words) {
            const negative = kind === NEGATIVE || (kind === MIXED && (signs[s >> 3] >> (s++ & 7)) & 1);
            u[at] = low;
            u[at + top] = negative ? high | sign : high;
          }
        }
      }
    }
    copyFree(down * r * cols, (rows - down * r) * cols);
    const width1 = across * c;
    if (width1 < cols) for (let i = 0; i < down * r; i++) copyFree(i * cols + width1, cols - width1);
    this.at.set(`free.${stored}`, f).set(`magnitudes.${stored}`, m).set("signs", s);
    return u;
  }
}

// Puts the rows of the matrix of a transposed convolution back into its shape.
function untransposed(entry, bytes) {
  const { shape, groups } = entry, nOut = Number(shape[1]), nIn = Number(shape[0]) / groups;
  const size = product(shape.slice(2)) * ITEM[entry.dtype], out = new Uint8Array(bytes.length);
  for (let g = 0, from = 0; g < groups; g++)
    for (let o = 0; o < nOut; o++)
      for (let i = 0; i < nIn; i++, from += size)
        out.set(bytes.subarray(from, from + size), ((g * nIn + i) * nOut + o) * size);
  return out;
}

// ---- a file

// Open a file and check its header, its manifest and the kinds of its blocks. Throws FormatError.
export function openMuws(bytes, { maxBytes = MAX_BYTES } = {}) {
  return blaming(() => new MuwsFile(bytes, maxBytes));
}

// Errors of reading become those of the file.
function blaming(read) {
  try {
    return read();
  } catch (error) {
    if (error instanceof FormatError) throw error;
    return refuse(`the file contradicts itself, or is too large for this browser (${error})`);
  }
}

class MuwsFile {
  constructor(bytes, maxBytes) {
    const { version, spans, manifest } = frameOf(bytes);
    this.version = version;
    this.nBytes = bytes.length;
    this._bytes = bytes;
    this._spans = spans;
    this.tensors = [];
    const isObject = (x, what) => (x instanceof Map ? x : refuse(`${what} is '${shown(x)}', an object is needed`));
    for (const fields of get(manifest, "tensors", "list")) this.tensors.push(tensorOf(isObject(fields, "a tensor"), this.tensors));
    if (new Set(this.tensors.map((entry) => entry.name)).size < this.tensors.length) refuse("two tensors of the file have one name");
    this._chunks = get(manifest, "chunks", "list").map((fields) => chunkOf(isObject(fields, "a chunk")));
    for (const [name, about] of get(manifest, "modules", "object", new Map()))
      get(isObject(about, `the entry of module '${shown(name)}'`), "version", "integer", 1);
    this.extra = get(manifest, "extra", "object", new Map());
    if (nestsDeeper(this.extra)) refuse(`extra nests more than ${MAX_DEPTH} deep`);
    this.denseBytes = this.tensors.reduce((n, entry) => n + (entry.sameAs === null || entry.isCopy ? entry.nBytes : 0), 0);
    checkChunks(this.tensors, this._chunks, this.denseBytes);
    const promised = this._chunks.flatMap((chunk, i) => [...chunk.streams.keys()].map((name) => `c${i}.${name}`));
    const found = [...spans.keys()].filter((name) => name !== "manifest");
    if (promised.length !== found.length || promised.some((name, i) => name !== found[i]))
      refuse("the manifest declares other streams than the header");
    if (this.denseBytes > maxBytes) refuse(`its tensors take ${this.denseBytes} bytes, at most ${maxBytes} are allowed`);
    this._checkKinds();
  }

  // The bytes of each kind of stream, with its coders.
  streams() {
    const found = new Map();
    this._chunks.forEach((chunk, i) => {
      for (const [name, { coder }] of chunk.streams) {
        const key = name.replace("grid", "steps"), [start, stop] = this._spans.get(`c${i}.${name}`);
        const one = found.get(key) ?? { name: key, bytes: 0, coders: new Set() };
        one.bytes += stop - start;
        found.set(key, { ...one, coders: one.coders.add(coder) });
      }
    });
    return [...found.values()].map((one) => ({ ...one, coders: [...one.coders].sort().join("+") }));
  }

  _stream(i, name, n) {
    const { coder, checksum } = this._chunks[i].streams.get(name), coded = this._bytes.subarray(...this._spans.get(`c${i}.${name}`));
    if (crc32(coded) !== checksum) refuse(`stream 'c${i}.${name}' has another checksum than is declared: the file is damaged`);
    return decodeStream(coder, coded, n);
  }

  _kinds(i) {
    const n = this._chunks[i].pieces.reduce((sum, piece) => sum + blocksOf(piece), 0);
    const isThere = n && this._chunks[i].streams.has("kinds");
    return isThere ? unpackKinds(this._stream(i, "kinds", Math.ceil(n / 3)), n) : new Uint8Array(n);
  }

  // Each piece of a tensor in blocks with its kinds.
  *_kindsOfPieces() {
    for (let i = 0; i < this._chunks.length; i++) {
      const kinds = this._kinds(i);
      let at = 0;
      for (const piece of this._chunks[i].pieces) {
        const n = blocksOf(piece);
        yield [piece, kinds.subarray(at, at + n)];
        at += n;
      }
    }
  }

  // Compare the blocks of each tensor with the manifest before memory is taken for any tensor.
  _checkKinds() {
    let last = null, counts = [0, 0, 0];
    for (const [{ entry }, kinds] of this._kindsOfPieces()) {
      if (entry !== last) [last, counts] = [entry, [0, 0, 0]];
      for (let k = 0; k < kinds.length; k++) counts[kinds[k] === DENSE ? 0 : kinds[k] === PRUNED ? 2 : 1]++;
      if (counts.some((n, kind) => n > entry.counts[kind]))
        refuse(`${entry.name} has blocks ${counts}, the manifest declares ${entry.counts}`);
    }
  }

  // Yield [entry, map] for each tensor in blocks: {width, height, cell, counts}, three counts a cell, at most `most` a side.
  *maps(most = 192) {
    let last = null, map = null, row = 0;
    for (const [{ entry }, kinds] of this._kindsOfPieces()) {
      if (!entry.block || !entry.grid[0] || !entry.grid[1]) continue;
      const [down, across] = entry.grid;
      if (entry !== last) {
        if (map) yield [last, map];
        const cell = entry.grid.map((n) => Math.ceil(n / most)), height = Math.ceil(down / cell[0]), width = Math.ceil(across / cell[1]);
        [last, row, map] = [entry, 0, { width, height, cell, counts: new Uint32Array(3 * width * height) }];
      }
      for (let k = 0; k < kinds.length; row++) {
        const start = Math.floor(row / map.cell[0]) * map.width;
        for (let j = 0; j < across; j++, k++) {
          const kind = kinds[k] === DENSE ? 0 : kinds[k] === PRUNED ? 2 : 1;
          map.counts[3 * (start + Math.floor(j / map.cell[1])) + kind]++;
        }
      }
    }
    if (map) yield [last, map];
  }

  // Yield [entry, bytes] of each tensor that is stored, in the order of the file; checks every stream.
  *decode() {
    for (const entry of this.tensors) if (entry.sameAs === null && !entry.numel) yield [entry, new Uint8Array(0)];
    let bytes = null, at = 0;
    for (let i = 0; i < this._chunks.length; i++) {
      const chunk = this._chunks[i], left = new Set(chunk.streams.keys()), kinds = this._kinds(i);
      if (kinds.length) left.delete("kinds");
      const reader = new ChunkReader(chunk, kinds, (name, n) => (n && left.delete(name) ? this._stream(i, name, n) : null));
      if (left.size) refuse(`chunk ${i} has streams that belong to none of its tensors: ${[...left].join().slice(0, 100)}`);
      for (const piece of chunk.pieces) {
        const { entry } = piece, found = reader.bytes(piece);
        if (piece.start === 0) [bytes, at] = [piece.stop === entry.matrix[0] ? null : new Uint8Array(entry.nBytes), 0];
        if (bytes) bytes.set(found, at);
        at += found.length;
        if (piece.stop === entry.matrix[0]) {
          const whole = bytes ?? found;
          bytes = null;
          yield [entry, entry.outAxis ? untransposed(entry, whole) : whole];
        }
      }
    }
  }

  // The parts of a safetensors file of all tensors; `progress` is called with the bytes done and all bytes.
  safetensors(progress = () => {}) {
    const wrong = this.tensors.find((entry) => !has(SAFETENSORS, entry.dtype));
    if (wrong) throw new Error(`${wrong.name.slice(0, 100)} is ${wrong.dtype}, which safetensors does not support`);
    const lone = /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/;
    const name = this.tensors.map((entry) => entry.name).find((text) => text === "__metadata__" || lone.test(text));
    if (name !== undefined) throw new Error(`no tensor of a safetensors file can be named ${JSON.stringify(name).slice(0, 100)}`);
    const found = new Map();
    let done = 0;
    blaming(() => {
      for (const [entry, bytes] of this.decode()) {
        found.set(entry, bytes);
        progress((done += bytes.length), this.denseBytes);
      }
    });
    const ordered = [...this.tensors].sort((a, b) => ITEM[b.dtype] - ITEM[a.dtype]), parts = [];
    let at = 0;
    const entries = ordered.map((entry) => {
      const bytes = found.get(entry.sameAs === null ? entry : this.tensors[entry.sameAs]);
      parts.push(bytes);
      const about = `{"dtype":"${SAFETENSORS[entry.dtype]}","shape":[${entry.shape}],"data_offsets":[${at},${(at += bytes.length)}]}`;
      return `${JSON.stringify(entry.name)}:${about}`;
    });
    const json = new TextEncoder().encode(`{${entries.join(",")}}`), size = Math.ceil(json.length / 8) * 8;
    const head = new Uint8Array(8 + size).fill(32);
    new DataView(head.buffer).setBigUint64(0, BigInt(size), true);
    head.set(json, 8);
    return [head, ...parts];
  }
}

const SAFETENSORS = {
  float64: "F64", float32: "F32", float16: "F16", bfloat16: "BF16", int64: "I64", int32: "I32", int16: "I16", int8: "I8", uint8: "U8",
  uint16: "U16", uint32: "U32", uint64: "U64", bool: "BOOL", complex64: "C64", float8_e4m3fn: "F8_E4M3", float8_e5m2: "F8_E5M2",
  float8_e4m3fnuz: "F8_E4M3FNUZ", float8_e5m2fnuz: "F8_E5M2FNUZ", float8_e8m0fnu: "F8_E8M0",
};
