/* Hashes as text: lower-case hex, eight digits at a time and without branches on what they are (half of the digits of a
 * hash are letters at random: a branch on each is mispredicted about twenty times per hash). */
#ifndef FCAS_COMMON_HEX_H
#define FCAS_COMMON_HEX_H

#include <stdint.h>
#include <string.h>

#include "common/bytes.h"

/* The values of eight digits, a byte each, in the order of the text. Returns 1, or 0 (and some value) when one of the
 * eight bytes is no lower-case hex digit. text: 8 bytes, any alignment. */
static inline int fcas_hex_values8(const uint8_t text[8], uint64_t *values)
{
    const uint64_t ONES = UINT64_C(0x0101010101010101);
    uint64_t x = fcas_load_le64(text);
    uint64_t v = (x & 0x0f * ONES) + (x >> 6 & ONES) * 9; /* bit 6 tells letters; at most 24: no carries */
    uint64_t again = v + '0' * ONES + ((v + 6 * ONES) >> 4 & ONES) * ('a' - '0' - 10);
    *values = v;
    return again == x && (v & 0x10 * ONES) == 0; /* spelled again it is the text, and no value is beyond 15 */
}

/* The 32 bytes of a hash from its 64 digits. Returns 1, or 0 (hash undefined) when one of them is no lower-case hex
 * digit. hot */
static inline int fcas_hex_decode_hash(const uint8_t text[64], uint8_t hash[32])
{
    int ok = 1;
    for (int i = 0; i < 8; i++) {
        uint64_t v;
        ok &= fcas_hex_values8(text + 8 * i, &v);
        v = (v << 4 | v >> 8) & UINT64_C(0x00ff00ff00ff00ff); /* pairs: the first digit is the high one */
        v = (v | v >> 8) & UINT64_C(0x0000ffff0000ffff);
        uint32_t four = (uint32_t)(v | v >> 16);
        memcpy(hash + 4 * i, &four, 4);
    }
    return ok;
}

#endif
