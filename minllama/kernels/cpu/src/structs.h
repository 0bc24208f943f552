// What a Llama is to the native step: shapes and where its values are. Python fills these structs in
// (minllama/kernels/cpu/structs.py has the same fields in the same order, which fields.inc checks) and owns
// all that they point to.
//
// Shape letters are those of minllama/model/llama.py; N is the number of tokens of a step.

#pragma once

#include <cstdint>

enum Kind : int32_t { INT4 = 0, INT8 = 1, FLOAT32 = 2, BFLOAT16 = 3, FLOAT16 = 4 };

struct Values {
    const void* data;
    int64_t kind;  // FLOAT32, BFLOAT16 or FLOAT16
};

// y = W x + b. Quantized weights are in tiles of 16 rows, as minllama/quantization/modules.py describes:
// value = scale * quant + min, or scale * (quant - 8 or 128) where there are no mins.
struct Linear {
    const void* weight;      // (out / 16, in / 32, 256 or 512) bytes, or (out, in) values
    const uint16_t* scales;  // (out / 16, in / 32, 16) float16
    const uint16_t* mins;    // the same, or null
    Values bias;             // (out,), or null
    int64_t kind;
    int64_t in_dim;
    int64_t out_dim;
};

struct Layer {
    Values attention_norm;  // (D,)
    Linear query, key, value, output;
    Values ffn_norm;  // (D,)
    Linear w1, w2, w3;
};

struct Model {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim;
    int64_t activation_bits;  // of integers beside quantized weights: 16 or 8
    // At least 12: so many tokens are multiplied as winograd.inc does. Or 0, where none are: as in a layer that is not
    // quantized throughout, since the gate of its feed-forward reads activations in one order only.
    int64_t sums_from;
    int64_t amx_from;  // so many tokens are multiplied in bfloat16, by amx.inc: in_dim of all layers is a multiple of 32. Or 0
    double norm_eps;
    Linear embedding;  // (V, D)
    Linear output;     // the same one where they are tied
    Values norm;       // (D,)
    const Layer* layers;
};

// N tokens that continue what a cache holds; each sees the slots up to its own of its row, or, where `seen`
// is given, the first ones and its ancestors.
struct Step {
    int64_t n_tokens;
    const int64_t* ids;        // (N,)
    const int64_t* rows;       // (N,), of the cache
    const int64_t* slots;      // (N,), of the cache
    const int64_t* seen;       // (N,), how many slots of its row a token sees from the first on; or null
    int64_t n_ancestors;
    const int64_t* ancestors;  // (N, n_ancestors), further slots that a token sees, the rest -1; or null
    const float* rotation;     // (N, C / 2, 2): cosine and sine
    void* const* keys;         // n_layers of (rows, K, S, C)
    void* const* values;       // the same
    int64_t cache_kind;        // FLOAT32, BFLOAT16 or FLOAT16
    int64_t row_stride;        // values from one row of a cache to the next
    int64_t head_stride;       // and from one head to the next
    float* hidden;             // (N, D), after the last norm
    int64_t n_logits;
    const int64_t* logits_of;  // (n_logits,), which tokens
    int64_t only_logits;       // whether nothing else is computed behind the last attention: hidden states neither
    float* logits;             // (n_logits, V)
    double* lost;              // (1,), written: seconds, summed over threads, in which others had their cores; or null
};

// Arguments of the single operations of elementwise.inc; kinds are FLOAT32, BFLOAT16 or FLOAT16.
struct Norm {
    int64_t rows, dim;
    double eps;
    void* x;             // (rows, dim)
    int64_t x_kind;
    const void* weight;  // (dim,)
    int64_t weight_kind;
    void* y;             // (rows, dim): the result, or its gradient
    int64_t y_kind;
    float* inverse;      // (rows,)
    void* gradient;      // (rows, dim), as x; of the backward pass only
    float* of_weight;    // (threads, dim), or null: of the backward pass only
};

struct SwiGLU {
    int64_t n, kind;
    void *u, *v;  // (n,)
    void* y;      // (n,): the result, or its gradient
    void *u_gradient, *v_gradient;
};

struct RoPE {
    int64_t tokens, heads, head_dim, kind, n_rotations, back;
    void* x;  // (tokens, heads, C)
    void* y;
    const float* rotation;  // (n_rotations, C / 2, 2); token t has number t % n_rotations
};

struct Dequantize {
    const Linear* weight;
    void* y;  // (in, out)
    int64_t kind;
};

// Blocks of a GGUF file, row after row, and the tiles of a Linear that they become.
struct Blocks {
    int64_t rows, blocks, bytes, kind;  // blocks a row, bytes a block, INT4 or INT8
    const uint8_t* data;                // (rows, blocks, bytes): scale, min where there are mins, values
    void* weight;                       // all rows of the last tile, those too that are not there
    uint16_t *scales, *mins;            // mins: or null
};

struct Matmul {
    const Linear* weight;
    int64_t rows, activation_bits, sums_from;  // the latter as in Model
    float* x;        // (rows, in)
    int8_t* quants;  // room for (rows, in / 32, 96), and so on: see Activations
    float* scales;
    int32_t* sums;
    float* y;       // (rows, out)
    float* panels;  // room for (rows, in), rows rounded up to 48: for many rows of dense weights; or null
};

// Y = X W^T, or X W, in bfloat16: amx.inc.
struct HalfMatmul {
    const Linear* weight;  // of the latter dense, with in_dim and out_dim of the product
    int64_t transposed;    // whether it is stored as (in, out): the latter
    int64_t rows;
    const uint16_t* x;     // (rows, in)
    uint16_t* y;           // (rows, out)
};

struct AdamW {
    int64_t n_tensors;
    const int64_t* starts;  // (n_tensors + 1,): where each begins in the row of all of them
    float* const* parameters;
    const float* const* gradients;
    float* const* exp_avgs;
    float* const* exp_avg_sqs;
    double beta1, beta2, eps;
    double step_size;  // of the update
    double shrink;     // factor on what it leaves: 1 - lr * weight_decay
};

// Heads of texts: value (row, token, head, i) is at row * row_stride + token * token_stride +
// head * head_stride + i.
struct Heads {
    void* data;
    int64_t row_stride, token_stride, head_stride;
};

struct Attention {
    int64_t rows, length, n_heads, n_kv_heads, head_dim, kind;
    const int64_t* starts;  // (rows + 1,): where texts of at most `length` tokens begin among those of
                            // one row; or null, and there are as many rows of just that length
    Heads query, key, value, out;
    float* log_sums;  // of each text (H, its length): of e^score over the keys that a query sees
    Heads out_gradient, query_gradient, key_gradient, value_gradient;  // of the backward pass only
};

struct LowRank {
    int64_t rows, in_dim, out_dim, rank, kind;
    int64_t onto;     // whether the result is added to what y holds
    double scale;
    double dropout;   // probability with which each number of x is taken for zero
    int64_t seed;     // of which ones
    const void* x;    // (rows, in)
    const float* a;   // (rank, in)
    const float* b;   // (out, rank)
    void* y;          // (rows, out): the result, or its gradient
    float* low;       // (rows, rank): A x
    void* x_gradient; // (rows, in), or null; this and the next of the backward pass only
    float *a_parts;   // (threads, rank, in), to be summed
    float *b_parts;   // (threads, rank, out): of B^T, to be summed
};

struct Draw {
    int64_t rows, size;
    double temperature, top_p, min_p;
    const float* logits;     // (rows, size)
    const double* uniforms;  // (rows,)
    int64_t* chosen;         // (rows,)
};
