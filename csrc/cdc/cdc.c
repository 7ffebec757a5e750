#include "cdc/cdc.h"

#include "cdc/gear.h"

fcas_status fcas_cdc_init(fcas_cdc *c, uint32_t average)
{
    uint32_t bits = 0;
    if (average < FCAS_CDC_AVERAGE_MIN || average > FCAS_CDC_AVERAGE_MAX || (average & (average - 1)) != 0)
        return FCAS_E_ARG;
    while (1u << bits < average)
        bits++;
    c->min = average / 4;
    c->normal = average / 4 * 3;
    c->max = average * 4;
    c->length = 0;
    c->hash = 0;
    c->strict = 1ull << (64 - (bits + 2));
    c->loose = 1ull << (64 - (bits - 2));
    return FCAS_OK;
}

static inline uint64_t roll(uint64_t h, uint8_t byte)
{
    return (h << 1) + fcas_cdc_gear[byte];
}

/* The hash after the bytes p[0..n). */
static uint64_t roll_over(uint64_t h, const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h = roll(h, p[i]);
    return h;
}

/* Roll over p[0..n): how many bytes up to the first after which h is below the limit, or n + 1.
 *
 * Two bytes at a time: a hash that waits for the one before it takes two cycles a byte, of which one is saved when
 * 4 * h + (2 * G[a] + G[b]) is added up beside 2 * h + G[a]. Four streams side by side (a hash forgets what is 64 bytes
 * behind it) were measured at no more. */
static size_t search(uint64_t *hash, const uint8_t *p, size_t n, uint64_t limit) /* hot */
{
    uint64_t h = *hash;
    size_t   i = 0;
    for (; i + 2 <= n; i += 2) {
        const uint64_t one = roll(h, p[i]);
        h = (h << 2) + ((fcas_cdc_gear[p[i]] << 1) + fcas_cdc_gear[p[i + 1]]);
        if (one < limit)
            return i + 1;
        if (h < limit)
            return i + 2;
    }
    if (i < n) {
        h = roll(h, p[i]);
        if (h < limit)
            return i + 1;
    }
    *hash = h;
    return n + 1;
}

size_t fcas_cdc_next(fcas_cdc *c, const uint8_t *p, size_t n, bool *is_cut)
{
    const uint32_t begin = c->min - FCAS_CDC_WINDOW; /* what lies before is in no window */
    size_t         at = 0;

    *is_cut = false;
    if (c->length < begin) {
        const size_t skipped = begin - c->length;
        if (n <= skipped) {
            c->length += (uint32_t)n;
            return n;
        }
        at = skipped;
        c->length = begin;
        c->hash = 0;
    }
    if (c->length < c->min - 1) { /* no chunk ends here yet */
        const size_t missing = c->min - 1 - c->length;
        const size_t take = n - at < missing ? n - at : missing;
        c->hash = roll_over(c->hash, p + at, take);
        c->length += (uint32_t)take;
        at += take;
    }
    while (at < n) {
        /* lengths up to normal - 1 are tested strictly, up to max - 1 loosely, and max ends a chunk untested */
        const bool     is_strict = c->length + 1 < c->normal;
        const size_t   room = (is_strict ? c->normal : c->max) - 1 - c->length;
        const size_t   take = n - at < room ? n - at : room;
        const size_t   found = room == 0 ? 1 : search(&c->hash, p + at, take, is_strict ? c->strict : c->loose);
        if (room == 0 || found <= take) {
            c->length = 0;
            *is_cut = true;
            return at + found;
        }
        c->length += (uint32_t)take;
        at += take;
    }
    return n;
}
