// What the emulator and a GPU have in common for the kernels' test.
#pragma once

namespace machines {

struct grid {
    int x = 1, y = 1, z = 1;
};

// which matrix unit mma_s4 and mma_s8 go to: of the emulator's choice, a GPU has its own
enum class generation { TURING, AMPERE };

} // namespace machines
