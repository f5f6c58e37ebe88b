// What our C++ tests share: counted checks and random values.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

inline int failures = 0;
inline int checks   = 0;

inline void check(bool ok, const std::string & what) {
    ++checks;
    if (!ok) {
        ++failures;
        printf("FAILED: %s\n", what.c_str());
    }
}

// normal values; with outliers, about one in 97 is that many times as large
inline std::vector<float> random_values(size_t n, uint32_t seed, float outliers = 0.0f) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
        if (outliers > 0.0f && rng() % 97 == 0) {
            v *= outliers;
        }
    }
    return x;
}
