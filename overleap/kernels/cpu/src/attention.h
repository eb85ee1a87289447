// Attention over window rows and compressed entries, and the choice of entries: index_topk, attend.
// See ../attention.py for the ops. Read next: kernel_index.cpp, kernel_attention.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "linear.h"

namespace overleap {

// The new tokens of one sequence: `count` from absolute position `start`, packed from row `first`.
struct Stretch {
    int64_t start, count, first;
    int64_t slot;  // of its window ring; index_topk has none
};

enum class RowKind : int { kv, key, wide };

// How a cache row is kept; see RowFormat in kernels/spec.py.
struct RowLayout {
    RowKind kind;
    int64_t width, rope;
    int64_t bytes;  // of a stored row
};

// Rows of one layer in pages; a sequence counts its rows as entries.
struct Pages {
    const uint8_t* rows;  // [pages, per_page, layout.bytes]
    RowLayout layout;
    int64_t per_page;
    const int64_t* table;  // [sequences, table_width]
    int64_t table_width;

    // Where entry `number` of a sequence is stored.
    const uint8_t* entry(int64_t sequence, int64_t number) const {
        const int64_t at = page_of(number), page = table[sequence * table_width + at];
        return rows + (page * per_page + number - at * per_page) * layout.bytes;
    }

    // Entries from this one on that follow one another in memory.
    int64_t left(int64_t number) const { return (page_of(number) + 1) * per_page - number; }

    // A page has a power of two rows, usually: a division would take as long as reading one.
    int64_t page_of(int64_t number) const {
        const bool power = (per_page & (per_page - 1)) == 0;
        return power ? number >> __builtin_ctzll(per_page) : number / per_page;
    }
};

// The k best entries of every token: out i64 [tokens, k], best first, -1 behind.
struct Choice {
    const uint8_t* q;     // [tokens, heads, layout.bytes], as the keys are stored
    const float* weight;  // [tokens, heads]
    int64_t heads;
    Pages keys;
    int64_t ratio, k;
    std::vector<Stretch> sequences;
    int64_t* out;
    int threads;
};

// One softmax for every token over window rows, entries and a sink.
struct Attention {
    const void* q;  // [tokens, heads, width]
    Float type;     // of q and out
    int64_t heads, width;
    const uint8_t* fresh;  // [tokens, layout.bytes]
    const uint8_t* ring;   // [slots, ring_rows, layout.bytes]
    int64_t ring_rows;
    RowLayout layout;
    Pages entries;          // rows: null for none
    const int64_t* chosen;  // [tokens, k], or null for every visible entry
    int64_t k, ratio;
    const float* sink;  // [heads]
    float scale;
    int64_t window;
    std::vector<Stretch> sequences;
    void* out;   // [tokens, heads, width]
    float* log;  // [tokens, heads]
    int threads;
};

OVERLEAP_EVERY_ISA(void choose(const Choice&); void attend(const Attention&);)

}  // namespace overleap
