/* Where connections come from: an IPv4 address or an IPv6 /64. Counts the connections of each source against the cap,
 * and is what the upload limit takes turns by. Loopback and own prefixes are exempt from the cap; behind them, each
 * connection is a source of its own, and has one only where the upload limit needs it. */
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define FIRST_BUCKETS 64u

static uint32_t bucket_of(const fcas_engine *e, const uint8_t key[16])
{
    uint8_t padded[32] = {0};
    memcpy(padded, key, 16);
    return (uint32_t)fcas_siphash32(e->source_secret, padded) & (e->n_source_buckets - 1);
}

static void grow(fcas_engine *e)
{
    uint32_t      n = e->n_source_buckets ? 2 * e->n_source_buckets : FIRST_BUCKETS, old_n = e->n_source_buckets;
    fcas_source **old = e->sources, **fresh = calloc(n, sizeof *fresh);
    if (!fresh)
        return;
    e->sources = fresh;
    e->n_source_buckets = n;
    for (uint32_t i = 0; i < old_n; i++) {
        for (fcas_source *s = old[i], *next; s; s = next) {
            next = s->chain;
            uint32_t to = bucket_of(e, s->key);
            s->chain = fresh[to];
            fresh[to] = s;
        }
    }
    free(old);
}

int fcas_source_is_exempt(const fcas_engine *e, const uint8_t ip[16])
{
    for (uint32_t i = 0; i < e->config.n_own; i++) {
        const fcas_prefix *own = &e->config.own[i];
        uint32_t           whole = own->bits / 8, rest = own->bits % 8;
        if (memcmp(own->ip, ip, whole) == 0 && (rest == 0 || ((own->ip[whole] ^ ip[whole]) >> (8 - rest)) == 0))
            return 1;
    }
    return 0;
}

static fcas_source *find(fcas_engine *e, const uint8_t key[16])
{
    fcas_source *s = e->sources[bucket_of(e, key)];
    while (s && memcmp(s->key, key, 16) != 0)
        s = s->chain;
    return s;
}

int fcas_source_enter(fcas_engine *e, fcas_conn *c)
{
    static const uint8_t MAPPED[12] = {[10] = 0xff, [11] = 0xff};
    uint8_t key[16] = {0};
    int     is_exempt = c->local || fcas_source_is_exempt(e, c->ip);
    if (is_exempt ? !e->config.bucket : !e->config.bucket && !e->config.max_per_source)
        return 0;
    fcas_source *s = NULL;
    if (!is_exempt) {
        memcpy(key, c->ip, memcmp(c->ip, MAPPED, 12) == 0 ? 16 : 8);
        if (e->n_sources >= e->n_source_buckets)
            grow(e);
        if (!e->sources)
            return -1;
        s = find(e, key);
        if (s && e->config.max_per_source && s->n_conns >= e->config.max_per_source)
            return -1;
    }
    if (!s) {
        if (!(s = calloc(1, sizeof *s)))
            return -1;
        memcpy(s->key, key, 16);
        s->listed = !is_exempt;
        if (s->listed) {
            uint32_t at = bucket_of(e, key);
            s->chain = e->sources[at];
            e->sources[at] = s;
            e->n_sources++;
        }
    }
    s->n_conns++;
    c->source = s;
    return 0;
}

void fcas_source_leave(fcas_engine *e, fcas_conn *c)
{
    fcas_source *s = c->source;
    c->source = NULL;
    if (!s || --s->n_conns)
        return;
    if (s->listed) {
        fcas_source **at = &e->sources[bucket_of(e, s->key)];
        while (*at != s)
            at = &(*at)->chain;
        *at = s->chain;
        e->n_sources--;
    }
    free(s);
}
