/* Internal to csrc/table: SipHash-2-4 (Aumasson, Bernstein 2012) of exactly 32 bytes. */
#ifndef FCAS_TABLE_SIPHASH_H
#define FCAS_TABLE_SIPHASH_H

#include <stdint.h>

#include "common/bytes.h"

static inline uint64_t fcas_sip_rotl(uint64_t x, int n)
{
    return (x << n) | (x >> (64 - n));
}

static inline void fcas_sip_round(uint64_t v[4])
{
    v[0] += v[1];
    v[2] += v[3];
    v[1] = fcas_sip_rotl(v[1], 13) ^ v[0];
    v[3] = fcas_sip_rotl(v[3], 16) ^ v[2];
    v[0] = fcas_sip_rotl(v[0], 32);
    v[2] += v[1];
    v[0] += v[3];
    v[1] = fcas_sip_rotl(v[1], 17) ^ v[2];
    v[3] = fcas_sip_rotl(v[3], 21) ^ v[0];
    v[2] = fcas_sip_rotl(v[2], 32);
}

/* The length is constant, so the last block is, too: 32 in its top byte. */
static inline uint64_t fcas_siphash32(const uint64_t secret[2], const uint8_t key[32])
{
    uint64_t v[4] = {secret[0] ^ UINT64_C(0x736f6d6570736575), secret[1] ^ UINT64_C(0x646f72616e646f6d),
                     secret[0] ^ UINT64_C(0x6c7967656e657261), secret[1] ^ UINT64_C(0x7465646279746573)};
    for (int i = 0; i < 5; i++) {
        uint64_t m = i < 4 ? fcas_load_le64(key + 8 * i) : UINT64_C(32) << 56;
        v[3] ^= m;
        fcas_sip_round(v);
        fcas_sip_round(v);
        v[0] ^= m;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 4; i++)
        fcas_sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

#endif
