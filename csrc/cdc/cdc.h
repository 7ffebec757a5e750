/* Content-defined cuts: FastCDC with normalized chunking (Xia and others, USENIX ATC 2016), exactly:
 *
 * Gear table. G[b], b = 0..255: the first 8 bytes, as a little-endian number, of
 *     SHA-256("fastcas gear table 1" followed by the byte b)          (20 letters of ASCII and one byte)
 * Hash. For a place i in the content with at least 64 bytes before it:
 *     H(i) = sum over j = 0..63 of G[content[i - 1 - j]] * 2^j  modulo 2^64
 * which is h = 2 * h + G[byte] rolled over these 64 bytes, from any h: it depends on them alone.
 * Rule. An average a, a power of two, gives min = a / 4, normal = 3 * a / 4, max = 4 * a. A chunk that begins at s
 * ends at the first i = s + p with
 *     p = max, or
 *     min <= p < normal    and the upper log2(a) + 2 bits of H(i) are 0, or
 *     normal <= p < max    and the upper log2(a) - 2 bits of H(i) are 0, or
 *     i the end of the content.
 * As min >= 64, every window lies within its chunk: where a chunk ends depends on nothing before its begin.
 * On random bytes the chunks' mean is 0.94 a.
 *
 * Cuts are the same however the content is split between calls. Never allocates, never fails. */
#ifndef FCAS_CDC_CDC_H
#define FCAS_CDC_CDC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_CDC_WINDOW 64u
#define FCAS_CDC_AVERAGE_MIN (256u)
#define FCAS_CDC_AVERAGE_MAX (4u << 20)

typedef struct {
    uint32_t min, normal, max; /* bytes of a chunk */
    uint32_t length;           /* bytes of the present chunk so far, 0..max-1 */
    uint64_t strict, loose;    /* 2^(64 - bits): a hash below it ends a chunk */
    uint64_t hash;             /* rolled over the chunk's bytes from min - 64 on */
} fcas_cdc;

/* Begin a content. FCAS_E_ARG (and *c unchanged) unless average is a power of two from 256 B to 4 MiB. */
fcas_status fcas_cdc_init(fcas_cdc *c, uint32_t average);

/* Take bytes of p up to the next cut, at most n: returns how many. *is_cut says whether a chunk ends after them; if
 * not, all n were taken. The content's end is a cut that the caller knows of. */
size_t fcas_cdc_next(fcas_cdc *c, const uint8_t *p, size_t n, bool *is_cut);

#endif
