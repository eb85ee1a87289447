// The state of the machine's matrix unit (AMX), which belongs to the thread.
#pragma once

#include "simd.h"

namespace overleap::OVERLEAP_ISA {

#if defined(__AMX_TILE__)

// Rows and bytes of a row of the eight tiles.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, zeros[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int rows_, int bytes_) {
        rows[tile] = static_cast<uint8_t>(rows_);
        bytes[tile] = static_cast<uint16_t>(bytes_);
    }
};

// This thread's tiles have these shapes while it lives, then those they had: torch remembers what it has
// set.
class Tiles {
    TileShapes before_;

  public:
    explicit Tiles(const TileShapes& shapes) {
        _tile_storeconfig(&before_);
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_loadconfig(&before_); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#endif

}  // namespace overleap::OVERLEAP_ISA
