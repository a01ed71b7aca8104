// The C ABI of qwenrt's CPU kernels, called from qwenrt/backends/cpu through ctypes. Plain C types only.
#pragma once
#include <stdint.h>

#define QWENRT_ABI 22
#if defined(_WIN32)
#define QWENRT_API extern "C" __declspec(dllexport)
#else
#define QWENRT_API extern "C" __attribute__((visibility("default")))
#endif

// Output rows are stored in blocks of 8: element [block][i][row of 8]. One word holds 32 / bits consecutive inputs of
// one row, lowest bits first. Each group of inputs starts a new word; inputs past its end have code 0 and activation 0.
#define QWENRT_BLOCK 8

// QWENRT_NOT_SERVED: the arguments are right, but these numbers are nothing for this function.
enum { QWENRT_OK = 0, QWENRT_NOT_FINITE = 1, QWENRT_NO_MEMORY = 2, QWENRT_BAD_ARGUMENT = 3, QWENRT_NOT_SERVED = 4 };

// What a quantised linear multiplies its codes with: activations as they are; rounded to int16; rounded to int8 beside
// 4-bit codes and to int16 beside 8-bit ones. Rounded ones share a scale by 128 inputs at most of one group.
enum { QWENRT_EXACT = 0, QWENRT_INT16 = 1, QWENRT_INT8 = 2 };

typedef struct {
  int32_t kind;  // QWENRT_EXACT, ...
  // Of QWENRT_INT8, which leaves large values at int16. A block is int8 where no activation is larger than `narrowest`
  // times the token's root mean square (the larger a block's values, the more its rounding weighs in a row's sum) and
  // none more than `outlier` times the block's mean, beside which a byte would make nothing of the others.
  float narrowest;
  float outlier;
  int32_t reserved;
  int64_t narrow_rows;  // of W, a multiple of 8: the first ones; all others have int16
} QwenrtActivations;

// As `zero` of 4-bit codes with float16 scales: a group's zero is what the last four bits of its scale say. The scale
// is the whole float16, these bits included: they are its least ones.
#define QWENRT_ZEROS_IN_SCALES (-1)

typedef struct {
  const uint32_t* words;  // [blocks][groups * words_per_group][8]
  const void* scales;     // [blocks][groups][8], float16 bits, or float32 where scales_are_float
  const void* zeros;      // [blocks][groups][8], uint16, or float32 where zeros_are_float; or NULL: all are `zero`, or
                          // each is in its scale
  const int32_t* perm;    // [in_features]: input i reads x[perm[i]], or NULL: x[i]
  const float* bias;      // [out_features] or NULL
  int64_t out_features;
  int64_t in_features;
  int64_t groups;
  int64_t group_size;      // inputs that share a scale
  int64_t words_per_group; // ceil(group_size * bits / 32)
  int32_t bits;            // 4 or 8
  int32_t zero;            // or QWENRT_ZEROS_IN_SCALES
  int32_t scales_are_float;
  int32_t zeros_are_float;
} QwenrtQuantMatrix;

// Version of this ABI; the loader refuses a library of another.
QWENRT_API int qwenrt_abi(void);
// The bytes of a struct of this ABI, by its name, as this library has it; -1 where there is none of that name.
QWENRT_API int64_t qwenrt_size_of(const char* name);
// The sets that this CPU and build run, best first: index 0, 1, ... until NULL. Any of "amx", "avx512vnni", "avx2",
// "neondot", "neon" and "scalar".
QWENRT_API const char* qwenrt_isa_at(int index);

// With which of these sets a call is computed, and by how many threads, the caller included. Each call is given one,
// and nothing else decides it: models with different ones serve beside each other.
typedef struct QwenrtHandle QwenrtHandle;
// A set by its name, or "auto": the best one -> a handle, which lasts as long as the process; NULL where this CPU or
// build lacks it. Where the system starts fewer threads, it has these.
QWENRT_API const QwenrtHandle* qwenrt_open(const char* set, int threads);
QWENRT_API const char* qwenrt_isa(const QwenrtHandle* with);
QWENRT_API int qwenrt_threads(const QwenrtHandle* with);
// codes [in_features][out_features], one a byte and below 2^bits -> words as in QwenrtQuantMatrix.
QWENRT_API int qwenrt_pack(const QwenrtHandle* with, const uint8_t* codes, uint32_t* words, int64_t in_features,
                           int64_t out_features, int64_t group_size, int bits);
// stored [in_features * bits / 32, rounded up][out_features], inputs in order along it, lowest bits first, as GPTQ
// files have them -> words as in QwenrtQuantMatrix. perm [in_features]: input k of words is input perm[k] of stored, or
// NULL.
QWENRT_API int qwenrt_repack(const QwenrtHandle* with, const uint32_t* stored, const int32_t* perm, uint32_t* words,
                             int64_t in_features, int64_t out_features, int64_t group_size, int bits);

// A dense matrix to be rounded in groups of inputs, and where its codes go.
enum { QWENRT_BFLOAT16 = 0, QWENRT_FLOAT16 = 1, QWENRT_FLOAT32 = 2 };
typedef struct {
  const void* weight;  // [out_features][in_features], row-major, in `dtype`
  uint32_t* words;     // [in_features * bits / 32, rounded up][out_features], as qwenrt_repack reads them
  float* scales;       // [groups][out_features]
  int16_t* zeros;      // likewise
  const double* clips; // shares of a group's range to try, in order
  int64_t out_features;
  int64_t in_features;
  int64_t group_size;  // groups = in_features / group_size, rounded up
  int32_t dtype;
  int32_t bits;        // 4 or 8
  int32_t num_clips;
  int32_t sym;         // whether the zero is the middle code
} QwenrtRounding;

// The same bits as qwenrt/ops/packing.py's quantize_rows on every CPU. Returns QWENRT_NOT_FINITE, with the results half
// written, where a weight or a scale is not finite.
QWENRT_API int qwenrt_quantize(const QwenrtHandle* with, const QwenrtRounding* a);
// Whether the handle's instruction set rounds activations beside float16 (is_half) or bfloat16 weights where it may.
QWENRT_API int qwenrt_rounds_dense(const QwenrtHandle* with, int is_half);

// A bfloat16 matrix in 12 bits a weight, without loss. A weight's upper byte is its sign and all but the last bit of
// its exponent, and 16 of these have nearly all weights of a matrix: `smallest` to `smallest` + 7, with either sign. A
// code of 4 bits names them: its first three are what is above `smallest`, the last one is the sign. The lower byte
// stays.
#define QWENRT_CHUNK 64        // inputs of a row that lie together, the last ones filled up with anything
#define QWENRT_CHUNK_BYTES 96  // 32 of codes, byte b with those of lower bytes b and b + 32; then 64 lower bytes
typedef struct {
  const uint8_t* chunks;  // [out_features][in_features / QWENRT_CHUNK, rounded up][QWENRT_CHUNK_BYTES]
  const float* bias;      // [out_features] or NULL
  // A weight with another upper byte has code 0 and lower byte 0 there and is in these, row n's from first[n] on:
  const int32_t* first;     // [out_features + 1]
  const int32_t* inputs;    // [first[out_features]]
  const uint16_t* weights;  // likewise
  int64_t out_features;
  int64_t in_features;
  int64_t smallest;  // 0 to 120
} QwenrtDense12;

// Whether the handle's instruction set gains from 12 bits.
QWENRT_API int qwenrt_dense12_serves(const QwenrtHandle* with);
// w [out_features][in_features] -> the chunks and `first` of `to`, in place: `smallest`, sizes and memory are given.
// Returns QWENRT_BAD_ARGUMENT where `smallest` is out of range, QWENRT_NOT_SERVED where more than 2^31 - 1 weights have
// no code.
QWENRT_API int qwenrt_dense12_pack(const QwenrtHandle* with, const uint16_t* w, const QwenrtDense12* to);
// Then the same w -> the inputs and the weights of `to`, likewise.
QWENRT_API int qwenrt_dense12_pack_others(const QwenrtHandle* with, const uint16_t* w, const QwenrtDense12* to);
// Rows [begin, end) as they were -> out [end - begin][in_features] bfloat16.
QWENRT_API int qwenrt_dense12_unpack(const QwenrtHandle* with, const QwenrtDense12* w, uint16_t* out, int64_t begin,
                                     int64_t end);

// What a linear's matrix is: 16 bits a weight as they are; QwenrtDense12; QwenrtQuantMatrix; linears of the same inputs,
// none of them in parts, whose outputs follow each other; or something that is not the library's to read.
enum {
  QWENRT_DENSE_BFLOAT16 = 0,
  QWENRT_DENSE_FLOAT16 = 1,
  QWENRT_DENSE12 = 2,
  QWENRT_QUANTIZED = 3,
  QWENRT_PARTS = 4,
  QWENRT_ELSEWHERE = 5
};
typedef struct QwenrtLinear {
  int32_t kind;
  int32_t reserved;
  const void* matrix;   // uint16_t [out_features][in_features]; one of the structs; QwenrtLinear [part_count]; or a name
  const float* bias;    // [out_features] or NULL, of 16 bits as they are: the others have their own
  int64_t part_count;
  int64_t out_features;
  int64_t in_features;
  // Of a quantised matrix, what its codes are multiplied with. Of a dense one, whether that may be rounded where many
  // tokens are faster so: to fixed point of 14 bits, where 256 inputs of a row of W share a scale and 32 of x; or with
  // AMX, beside bfloat16, to the sum of two bfloat16.
  QwenrtActivations activations;
} QwenrtLinear;

// y [tokens][out_features] = x [tokens][in_features] W^T + bias, float32, rows contiguous, accumulated in float32.
// Returns QWENRT_NOT_FINITE, and leaves y half written, where a quantised matrix meets infinities, NaN or numbers too
// large to sum; QWENRT_NO_MEMORY where there is none to lay out x; QWENRT_NOT_SERVED of one that is elsewhere, or has such
// a part.
QWENRT_API int qwenrt_linear(const QwenrtHandle* with, const QwenrtLinear* w, const float* x, float* y, int64_t tokens);

// Reads memory[0 .. words) once with all threads and returns the sum: what the memory can deliver at best.
QWENRT_API uint64_t qwenrt_read(const QwenrtHandle* with, const uint64_t* memory, int64_t words);
