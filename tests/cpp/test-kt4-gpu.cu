// test-kt4-cuda.cpp for nvcc: the same cases through the kernels in production, on a GPU. --speed measures them instead.

#define main test_main
#include "test-kt4-cuda.cpp"
#undef main

#include "cuda-speed.h"

int main(int argc, char ** argv) {
    if (argc > 1 && strcmp(argv[1], "--speed") == 0) {
        return measure_speed();
    }
    return test_main(argc, argv);
}
