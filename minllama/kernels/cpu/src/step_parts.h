// Which tokens of a step attend together.

#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "structs.h"

constexpr int64_t CHUNK = 128;  // slots of a cache that are looked at together
// Tokens of a run: fewer don't pay for reading keys as columns, more don't stay in the nearest caches. Of short
// prompts runs are shorter, so that all threads have some.
constexpr int64_t LEAST_RUN = 8, SHORT_RUN = 32, MOST_RUN = 64, LONG = 256;

// Consecutive tokens of one row of a cache.
struct Run {
    int64_t first, n;
};

// What a token sees of its row: the first slots, chunk by chunk, and its ancestors in one more chunk.
inline int64_t seen_by(const Step& step, int64_t token) { return step.seen ? step.seen[token] : step.slots[token] + 1; }

inline int64_t ancestors_of(const Step& step, int64_t token) {
    int64_t n = 0;
    while (n < step.n_ancestors && step.ancestors[token * step.n_ancestors + n] >= 0) ++n;
    return n;
}

inline int64_t chunks_of(const Step& step, int64_t token) {
    return (seen_by(step, token) + CHUNK - 1) / CHUNK + (ancestors_of(step, token) > 0);
}

struct StepParts {
    std::vector<Run> runs;
    std::vector<int64_t> singles;  // all other tokens
    int64_t chunks = 1;            // of the single token that sees most

    // False where there is no memory for them.
    bool find(const Step& step) {
        try {
            for (int64_t first = 0; first < step.n_tokens;) {
                int64_t end = first + 1;
                while (end < step.n_tokens && follows(step, end)) ++end;
                const int64_t n = end - first, most = n < LONG ? SHORT_RUN : MOST_RUN, pieces = (n + most - 1) / most;
                for (int64_t i = 0; i < pieces; ++i) {
                    add(step, first + n * i / pieces, n * (i + 1) / pieces - n * i / pieces);
                }
                first = end;
            }
        } catch (const std::bad_alloc&) {
            return false;
        }
        return true;
    }

   private:
    // Whether a token and the one before see all of their row up to themselves.
    static bool follows(const Step& step, int64_t token) {
        const int64_t slot = step.slots[token];
        return step.rows[token] == step.rows[token - 1] && slot == step.slots[token - 1] + 1 &&
               seen_by(step, token) == slot + 1 && seen_by(step, token - 1) == slot;
    }

    void add(const Step& step, int64_t first, int64_t n) {
        if (n >= LEAST_RUN) return runs.push_back({first, n});
        for (int64_t t = first; t < first + n; ++t) {
            singles.push_back(t);
            if (chunks_of(step, t) > chunks) chunks = chunks_of(step, t);
        }
    }
};
