// One forward pass through a whole Llama on a CPU, in one call: of a token of each row, which is a step of
// decoding, or of prompts. The model is minllama/model/llama.py's; this is the same pass without an interpreter
// between its products, on weights as they are stored (4 and 8 bits, or floating point).
//
// A plain C interface, called through ctypes: no headers of Python or torch are needed to build it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "structs.h"
#include "fields.inc"
#include "threads.h"
#include "step_parts.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#else
#define X86 0
#endif

// Whether the compiler's assembler knows AMX.
#if X86 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define AMX 0
#endif

// Whether this processor multiplies matrices of bfloat16 (AMX), and the system lets this process.
static bool amx_works() {
#if AMX
    static const bool works = [] {
        unsigned eax, ebx, ecx, edx;
        constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
        if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & BF16) || !(edx & TILES)) return false;
        if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & 1u << 5)) return false;  // AVX512-BF16
        constexpr long REQUEST_PERMISSION = 0x1023, OF_TILES = 18;  // arch_prctl, for this process
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, OF_TILES) == 0;
    }();
    return works;
#else
    return false;
#endif
}

#define EXPORT __attribute__((visibility("default")))

#if X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define VECTORS 512
namespace avx512 {
#include "simd.inc"
#include "activations.inc"
#include "matmul.inc"
#include "dense_panels.inc"
#include "winograd.inc"
#include "amx.inc"
#include "small_product.inc"
#include "cached_attention.inc"
#include "step_attention.inc"
#include "forward.inc"
#include "elementwise.inc"
#include "attention.inc"
#include "lora.inc"
#include "sampling.inc"
}
#undef VECTORS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VECTORS 256
namespace avx2 {
#include "simd.inc"
#include "activations.inc"
#include "matmul.inc"
#include "dense_panels.inc"
#include "winograd.inc"
#include "amx.inc"
#include "small_product.inc"
#include "cached_attention.inc"
#include "step_attention.inc"
#include "forward.inc"
#include "elementwise.inc"
#include "attention.inc"
#include "lora.inc"
#include "sampling.inc"
}
#undef VECTORS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define VECTORS 0
namespace plain {
#include "simd.inc"
#include "activations.inc"
#include "matmul.inc"
#include "dense_panels.inc"
#include "winograd.inc"
#include "amx.inc"
#include "small_product.inc"
#include "cached_attention.inc"
#include "step_attention.inc"
#include "forward.inc"
#include "elementwise.inc"
#include "attention.inc"
#include "lora.inc"
#include "sampling.inc"
}
#undef VECTORS

namespace {

constexpr int64_t LINE = 64;

// Bytes taken one after the other out of one allocation, each run on a cache line of its own.
class Arena {
   public:
    template <class T>
    T* take(int64_t n) {
        T* pointer = reinterpret_cast<T*>(base_ + used_);
        used_ += (n * int64_t(sizeof(T)) + LINE - 1) / LINE * LINE;
        return pointer;
    }
    void rebase(char* base) { base_ = base, used_ = 0; }
    int64_t used() const { return used_; }

   private:
    char* base_ = nullptr;
    int64_t used_ = 0;
};

// Whether a model has a dense matrix.
bool has_dense(const Model& model) {
    bool found = model.output.kind >= FLOAT32;
    for (int64_t i = 0; i < model.n_layers; ++i) {
        const Layer& l = model.layers[i];
        for (const Linear* w : {&l.query, &l.key, &l.value, &l.output, &l.w1, &l.w2, &l.w3}) found |= w->kind >= FLOAT32;
    }
    return found;
}

constexpr int64_t MOST_PANEL = 48;  // tokens of the widest panel, see dense_panels.inc
#if X86
static_assert(MOST_PANEL % avx512::PANEL == 0 && MOST_PANEL % avx2::PANEL == 0);
#endif

template <class Activations>
Activations activations(Arena& arena, const Model& model, int64_t tokens, int64_t n, bool with_panels) {
    Activations a;
    a.panels = with_panels ? arena.take<float>((tokens + MOST_PANEL - 1) / MOST_PANEL * MOST_PANEL * n) : nullptr;
    a.n = n;
    a.bits = model.activation_bits;
    a.sums_from = model.sums_from;
    a.amx_from = model.amx_from;
    a.bfloat16s = a.in_bfloat16(tokens) ? arena.take<uint16_t>(tokens * n) : nullptr;
    a.values = arena.take<float>(tokens * n);
    a.quants = arena.take<int8_t>(tokens * n * 3);
    a.scales = arena.take<float>(tokens * (n / 32 + 1));
    a.sums = arena.take<int32_t>(tokens * (n / 32 + 1));
    return a;
}

template <class Scratch, class Activations>
Scratch scratch_in(Arena& arena, const Model& model, const Step& step, const StepParts& parts) {
    const int64_t n = step.n_tokens, query = model.n_heads * model.head_dim;
    Scratch scratch;
    const bool with_panels = std::max(n, step.n_logits) > plain::FEW_TOKENS && has_dense(model);
    scratch.normed = activations<Activations>(arena, model, std::max(n, step.n_logits), model.dim, with_panels);
    scratch.attended = activations<Activations>(arena, model, n, query, with_panels);
    scratch.gated = activations<Activations>(arena, model, n, model.hidden_dim, with_panels);
    scratch.x = arena.take<float>(n * model.dim);
    scratch.projected = arena.take<float>(n * (query + 2 * model.n_kv_heads * model.head_dim));
    const int64_t singles = parts.singles.size();
    scratch.partial = arena.take<float>(singles * model.n_heads * parts.chunks * (model.head_dim + 2));
    scratch.parts = &parts;
    return scratch;
}

OpenMP openmp;

// Runs work(index, count, of) on threads; it may get fewer of them than it asks for.
void in_parallel(void (*work)(int64_t, int64_t, void*), void* of, int64_t threads) {
    struct Call {
        void (*work)(int64_t, int64_t, void*);
        void* of;
        static void run(void* call) {
            const Call* c = static_cast<Call*>(call);
            c->work(openmp.thread(), openmp.threads(), c->of);
        }
    } call = {work, of};
    if (threads == 1) {
        work(0, 1, of);
    } else if (openmp.parallel) {
        openmp.parallel(&Call::run, &call, unsigned(threads), 0);
    } else {
        // Workers are told how many they are when all have been started that can be.
        std::atomic<int64_t> count{0};
        std::vector<std::thread> others;
        const auto start = [&](int64_t i) {
            while (!count.load(std::memory_order_acquire)) std::this_thread::yield();
            work(i, count.load(std::memory_order_relaxed), of);
        };
        try {
            for (int64_t i = 1; i < threads; ++i) others.emplace_back(start, i);
        } catch (const std::exception&) {  // no more threads, or no memory for one: fewer will do
        }
        const int64_t all = int64_t(others.size()) + 1;
        count.store(all, std::memory_order_release);
        work(0, all, of);
        for (std::thread& other : others) other.join();
    }
}

// Memory that a thread keeps from call to call; null where there is none left.
char* kept_memory(int64_t bytes) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local int64_t size = 0;
    bytes += LINE;
    if (size < bytes || size > 4 * bytes + (1 << 20)) {
        memory.reset();
        memory.reset(new (std::nothrow) char[bytes]);
        size = memory ? bytes : 0;
        if (!memory) return nullptr;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (LINE - address % LINE) % LINE;
}

template <class Scratch>
struct Job {
    void (*pass)(const Worker&, const Model&, const Step&, const Scratch&, float*);
    const Model* model;
    const Step* step;
    Scratch scratch;
    float* buffers;
    int64_t buffer_len, began;
    std::atomic<int64_t> lost{0};  // ns since it began that threads did not spend on a core, summed over them
    Barrier barrier;

    static void run(int64_t index, int64_t count, void* of) {
        Job& job = *static_cast<Job*>(of);
        const Worker worker = {index, count, &job.barrier};
        const int64_t cpu = cpu_ns();
        job.pass(worker, *job.model, *job.step, job.scratch, job.buffers + index * job.buffer_len);
        if (cpu >= 0) job.lost.fetch_add(wall_ns() - job.began - (cpu_ns() - cpu), std::memory_order_relaxed);
    }
};

template <class Scratch, class Activations>
int run(void (*pass)(const Worker&, const Model&, const Step&, const Scratch&, float*), const Model& model,
        const Step& step, int64_t buffer_len, int64_t threads) {
    Job<Scratch> job;
    job.pass = pass, job.model = &model, job.step = &step;
    job.buffer_len = (buffer_len + 15) / 16 * 16;
    StepParts parts;
    if (!parts.find(step)) return 1;
    Arena arena;
    scratch_in<Scratch, Activations>(arena, model, step, parts);
    arena.take<float>(threads * job.buffer_len);
    char* memory = kept_memory(arena.used());
    if (!memory) return 1;
    arena.rebase(memory);
    job.scratch = scratch_in<Scratch, Activations>(arena, model, step, parts);
    job.buffers = arena.take<float>(threads * job.buffer_len);
    job.began = wall_ns();
    in_parallel(&Job<Scratch>::run, &job, threads);
    if (step.lost) *step.lost = double(job.lost) / 1e9;
    return 0;
}

constexpr int64_t WORTH_A_THREAD = 1 << 14;  // values to compute; to wake a thread takes as long

// What is shared one by one, and what in even parts, once for each thread: where a thread adds up what
// comes of its part, so that sums are the same from run to run, or turns matrices before it begins.
constexpr int64_t EACH = 1, EVENLY = 0;

// One operation over 0 .. total, shared among all threads or, where there is little work, by none: GNU
// OpenMP ends and starts threads where the size of its team changes.
template <class Arguments>
struct Operation {
    void (*part)(const Arguments&, int64_t, int64_t, float*, int64_t);
    const Arguments* arguments;
    int64_t total, grain, buffer_len;
    bool finely;
    float* buffers;
    Barrier barrier;

    static void run(int64_t index, int64_t count, void* of) {
        Operation& o = *static_cast<Operation*>(of);
        const Worker worker = {index, count, &o.barrier};
        const auto work = [&](int64_t begin, int64_t end) {
            o.part(*o.arguments, begin, end, o.buffers + index * o.buffer_len, index);
        };
        if (o.grain == EVENLY) return work(worker.begin(o.total), worker.end(o.total));
        worker.share((o.total + o.grain - 1) / o.grain, [&](int64_t begin, int64_t end) {
            work(begin * o.grain, std::min(end * o.grain, o.total));
        }, o.finely);
    }
};

// `grain`: EVENLY, or how many of `total` stay together.
template <class Arguments>
int operate(void (*part)(const Arguments&, int64_t, int64_t, float*, int64_t), const Arguments& arguments,
            int64_t total, int64_t grain, int64_t buffer_len, int64_t work, int64_t threads, bool finely = false) {
    if (work < 2 * WORTH_A_THREAD) threads = 1;
    buffer_len = (buffer_len + 15) / 16 * 16;
    char* memory = kept_memory(threads * buffer_len * int64_t(sizeof(float)));
    if (!memory) return 1;
    Operation<Arguments> operation = {part, &arguments, total, grain, buffer_len, finely, reinterpret_cast<float*>(memory), {}};
    in_parallel(&Operation<Arguments>::run, &operation, threads);
    return 0;
}

int64_t attention_work(const Attention& a) {
    return a.rows * a.n_heads * a.length * (a.head_dim + a.length / 2);
}

}  // namespace

extern "C" {

// The fields of the structs that calls are made with, and their sizes; see fields.inc.
EXPORT const char* minllama_fields() {
    static const std::string fields = described_fields();
    return fields.c_str();
}

// 2 for AVX-512 with VNNI, 1 for AVX2, 0 for plain C++: the best that this CPU has.
EXPORT int minllama_best_level() {
#if X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        return 2;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
}

EXPORT void minllama_use_openmp(void* parallel, void* thread, void* threads) {
    openmp.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
    openmp.thread = reinterpret_cast<int (*)()>(thread);
    openmp.threads = reinterpret_cast<int (*)()>(threads);
}

// Runs a step; 0 where it did, 1 where there is no memory for it.
EXPORT int minllama_step(const Model* model, const Step* step, int64_t threads, int level) {
    const int64_t buffer = plain::step_buffer(*model, *step);
#if X86
    if (level == 2) {
        return run<avx512::Scratch, avx512::Activations>(avx512::pass, *model, *step, buffer, threads);
    }
    if (level == 1) {
        return run<avx2::Scratch, avx2::Activations>(avx2::pass, *model, *step, buffer, threads);
    }
#endif
    (void)level;
    return run<plain::Scratch, plain::Activations>(plain::pass, *model, *step, buffer, threads);
}

#if X86
#define AT_LEVEL(function) (level == 2 ? avx512::function : level == 1 ? avx2::function : plain::function)
#else
#define AT_LEVEL(function) ((void)level, plain::function)
#endif

// As minllama_step, these give 0, or 1 where there is no memory left.
EXPORT int minllama_norm(const Norm* a, int64_t threads, int level) {
    return operate(AT_LEVEL(norm_rows), *a, a->rows, EACH, 3 * a->dim, a->rows * a->dim, threads);
}

EXPORT int minllama_norm_gradient(const Norm* a, int64_t threads, int level) {
    return operate(AT_LEVEL(norm_gradient_rows), *a, a->rows, EVENLY, 5 * a->dim, a->rows * a->dim, threads);
}

EXPORT int minllama_swiglu(const SwiGLU* a, int64_t threads, int level) {
    return operate(AT_LEVEL(swiglu_part), *a, a->n, plain::PART, 5 * plain::PART, a->n, threads);
}

EXPORT int minllama_swiglu_gradient(const SwiGLU* a, int64_t threads, int level) {
    return operate(AT_LEVEL(swiglu_gradient_part), *a, a->n, plain::PART, 5 * plain::PART, a->n, threads);
}

EXPORT int minllama_rope(const RoPE* a, int64_t threads, int level) {
    const int64_t width = a->heads * a->head_dim;
    return operate(AT_LEVEL(rope_tokens), *a, a->tokens, EACH, 2 * width, a->tokens * width, threads);
}

EXPORT int minllama_dequantize(const Dequantize* a, int64_t threads, int level) {
    const Linear& w = *a->weight;
    return operate(AT_LEVEL(dequantize), *a, plain::tiles(w), EACH, 0, w.in_dim * w.out_dim, threads);
}

EXPORT int minllama_pack(const Blocks* a, int64_t threads, int level) {
    const int64_t total = (a->rows + plain::TILE_ROWS - 1) / plain::TILE_ROWS;
    return operate(AT_LEVEL(pack_tiles), *a, total, EACH, 0, a->rows * a->blocks * plain::BLOCK, threads);
}

EXPORT int minllama_attention(const Attention* a, int64_t threads, int level) {
    const int64_t blocks = (a->length + plain::QUERIES - 1) / plain::QUERIES;
    const int64_t total = a->rows * a->n_kv_heads * blocks;
    return operate(AT_LEVEL(attention_items), *a, total, EACH, plain::attention_buffer(*a), attention_work(*a), threads);
}

EXPORT int minllama_attention_gradient(const Attention* a, int64_t threads, int level) {
    const int64_t total = a->rows * a->n_kv_heads;
    return operate(AT_LEVEL(attention_gradient_items), *a, total, EACH, plain::attention_buffer(*a), attention_work(*a), threads);
}

EXPORT int minllama_low_rank(const LowRank* a, int64_t threads, int level) {
    return operate(AT_LEVEL(low_rank_rows), *a, a->rows, EVENLY, plain::low_rank_buffer(*a), a->rows * (a->in_dim + a->out_dim), threads);
}

EXPORT int minllama_low_rank_gradient(const LowRank* a, int64_t threads, int level) {
    return operate(AT_LEVEL(low_rank_gradient_rows), *a, a->rows, EVENLY, plain::low_rank_buffer(*a), a->rows * (a->in_dim + a->out_dim),
                   threads);
}

EXPORT int minllama_adamw(const AdamW* a, int64_t threads, int level) {
    return operate(AT_LEVEL(adamw_part), *a, a->starts[a->n_tensors], plain::PART, 0, a->starts[a->n_tensors], threads);
}

// A row by one thread: one alone is not worth another.
EXPORT int minllama_draw(const Draw* a, int64_t threads, int level) {
    const int64_t work = a->rows > 1 ? a->rows * a->size : 0;
    return operate(AT_LEVEL(draw_rows), *a, a->rows, EACH, plain::sampling_buffer(*a), work, threads);
}

// Two calls: the second reads what the first has written.
EXPORT int minllama_quantize_activations(const Matmul* a, int64_t threads, int level) {
    return operate(AT_LEVEL(quantize_activations), *a, a->rows, EACH, 0, a->rows * a->weight->in_dim, threads);
}

EXPORT int minllama_matmul(const Matmul* a, int64_t threads, int level) {
    const Linear& w = *a->weight;
    const int64_t total = AT_LEVEL(matmul_parts)(*a);
    const bool finely = a->panels || (a->sums_from && a->rows >= a->sums_from);
    return operate(AT_LEVEL(matmul_tiles), *a, total, EACH, 0, w.in_dim * w.out_dim, threads, finely);
}

EXPORT int minllama_half_matmul(const HalfMatmul* a, int64_t threads, int level) {
    const int64_t total = AT_LEVEL(amx_parts)(*a->weight, a->rows);
    return operate(AT_LEVEL(half_matmul), *a, total, EACH, 0, a->rows * a->weight->out_dim, threads, true);
}

EXPORT int minllama_has_amx() { return amx_works(); }

// Also a first call, of two: for many rows of a dense weight.
EXPORT int minllama_pack_activations(const Matmul* a, int64_t threads, int level) {
    const int64_t panels = AT_LEVEL(panels_of)(a->rows);
    return operate(AT_LEVEL(pack_activations), *a, panels, EACH, 0, a->rows * a->weight->in_dim, threads);
}

}  // extern "C"
