// Random words by counting: Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
#pragma once
#include <instructions.cuh>

// Four words of 32 bits: a counter, or the random ones that Philox makes of it.
struct Words {
    uint32_t words[4];
};

// Returns the words of a counter under a key of two words, the lower in the key's lower half.
DEVICE Words philox(Words counter, uint64_t key) {
    uint32_t(&c)[4] = counter.words;
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t(0xD2511F53u) * c[0], product2 = uint64_t(0xCD9E8D57u) * c[2];
        c[0] = uint32_t(product2 >> 32) ^ c[1] ^ k0;
        c[1] = uint32_t(product2);
        c[2] = uint32_t(product0 >> 32) ^ c[3] ^ k1;
        c[3] = uint32_t(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return counter;
}
