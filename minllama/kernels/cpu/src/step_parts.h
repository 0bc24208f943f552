// Which tokens of a step attend together.

#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "structs.h"

constexpr int64_t CHUNK = 128;  // slots of a cache that are looked at together
// Tokens of a run: fewer don't pay for reading keys as columns, more don't stay in the nearest caches.
constexpr int64_t LEAST_RUN = 8, MOST_RUN = 32;

// Consecutive tokens of one row of a cache.
struct Run {
    int64_t first, n;
};

struct StepParts {
    std::vector<Run> runs;
    std::vector<int64_t> singles;  // all other tokens
    int64_t chunks = 1;            // of the single token that sees most

    // False where there is no memory for them.
    bool find(const Step& step) {
        try {
            for (int64_t first = 0; first < step.n_tokens;) {
                int64_t end = first + 1;
                while (end < step.n_tokens && step.rows[end] == step.rows[first] &&
                       step.slots[end] == step.slots[end - 1] + 1) {
                    ++end;
                }
                const int64_t n = end - first, pieces = (n + MOST_RUN - 1) / MOST_RUN;
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
    void add(const Step& step, int64_t first, int64_t n) {
        if (n >= LEAST_RUN) return runs.push_back({first, n});
        for (int64_t t = first; t < first + n; ++t) {
            singles.push_back(t);
            const int64_t seen = step.slots[t] + 1;
            if ((seen + CHUNK - 1) / CHUNK > chunks) chunks = (seen + CHUNK - 1) / CHUNK;
        }
    }
};
