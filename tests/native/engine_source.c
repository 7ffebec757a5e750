/* Sources of connections: who shares one, the cap, exemptions, and that nothing is left behind. Many addresses, so that
 * the table grows. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "line %d: not true: %s\n", __LINE__, #what);                                               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static fcas_engine engine;

static fcas_conn v4(uint32_t ip)
{
    fcas_conn c = {.ip = {[10] = 0xff, [11] = 0xff, [12] = (uint8_t)(ip >> 24), [13] = (uint8_t)(ip >> 16),
                          [14] = (uint8_t)(ip >> 8), [15] = (uint8_t)ip}};
    c.local = ip >> 24 == 127;
    return c;
}

static fcas_conn v6(uint64_t net, uint64_t host)
{
    fcas_conn c = {0};
    for (int i = 0; i < 8; i++) {
        c.ip[i] = (uint8_t)(net >> (56 - 8 * i));
        c.ip[8 + i] = (uint8_t)(host >> (56 - 8 * i));
    }
    return c;
}

static void cap(void)
{
    fcas_conn a = v4(0x08080808), b = a, c = a, neighbour = v4(0x08080809);
    engine.config.max_per_source = 2;
    CHECK(fcas_source_enter(&engine, &a) == 0 && fcas_source_enter(&engine, &b) == 0);
    CHECK(a.source == b.source && a.source->n_conns == 2);
    CHECK(fcas_source_enter(&engine, &c) == -1 && c.source == NULL);
    CHECK(fcas_source_enter(&engine, &neighbour) == 0 && neighbour.source != a.source);
    fcas_source_leave(&engine, &a);
    CHECK(fcas_source_enter(&engine, &c) == 0);
    fcas_source_leave(&engine, &b);
    fcas_source_leave(&engine, &c);
    fcas_source_leave(&engine, &neighbour);
    fcas_source_leave(&engine, &c); /* twice changes nothing */
    CHECK(engine.n_sources == 0);

    fcas_conn x = v6(0x2001067c02e80002, 1), y = v6(0x2001067c02e80002, 0xffffffffffffffff), z = v6(0x2001067c02e80003, 1);
    CHECK(fcas_source_enter(&engine, &x) == 0 && fcas_source_enter(&engine, &y) == 0 && x.source == y.source);
    CHECK(fcas_source_enter(&engine, &z) == 0 && z.source != x.source);
    fcas_source_leave(&engine, &x);
    fcas_source_leave(&engine, &y);
    fcas_source_leave(&engine, &z);
    CHECK(engine.n_sources == 0);
}

static void exempt(void)
{
    static const fcas_prefix OWN[] = {{.ip = {[10] = 0xff, [11] = 0xff, [12] = 10, [13] = 0x50}, .bits = 96 + 12},
                                      {.ip = {0xfd}, .bits = 8}};
    engine.config.own = OWN;
    engine.config.n_own = 2;
    CHECK(fcas_source_is_exempt(&engine, v4(0x0a500001).ip) && fcas_source_is_exempt(&engine, v4(0x0a5fffff).ip));
    CHECK(!fcas_source_is_exempt(&engine, v4(0x0a600000).ip) && !fcas_source_is_exempt(&engine, v4(0x0b500000).ip));
    CHECK(fcas_source_is_exempt(&engine, v6(0xfd12000000000000, 5).ip));
    CHECK(!fcas_source_is_exempt(&engine, v6(0xfc12000000000000, 5).ip));
    fcas_conn local[5], own[5];
    for (int i = 0; i < 5; i++) {
        local[i] = v4(0x7f000001);
        own[i] = v4(0x0a510000);
        CHECK(fcas_source_enter(&engine, &local[i]) == 0 && fcas_source_enter(&engine, &own[i]) == 0);
        CHECK(local[i].source == NULL && own[i].source == NULL); /* nothing depends on it */
    }
    fcas_bucket bucket = {0};
    engine.config.bucket = &bucket; /* now turns do: each is a source of its own */
    for (int i = 0; i < 5; i++) {
        CHECK(fcas_source_enter(&engine, &local[i]) == 0 && fcas_source_enter(&engine, &own[i]) == 0);
        CHECK(local[i].source && own[i].source && local[i].source != own[i].source);
        CHECK(i == 0 || local[i].source != local[0].source);
    }
    for (int i = 0; i < 5; i++) {
        fcas_source_leave(&engine, &local[i]);
        fcas_source_leave(&engine, &own[i]);
    }
    engine.config.bucket = NULL;
    engine.config.n_own = 0;
}

static void many(void)
{
    enum { N = 20000 };
    fcas_conn *conns = calloc(N, sizeof *conns);
    CHECK(conns);
    for (uint32_t i = 0; i < N; i++) {
        conns[i] = v4(0x08000000 + i / 2);
        CHECK(fcas_source_enter(&engine, &conns[i]) == 0);
    }
    CHECK(engine.n_sources == N / 2);
    for (uint32_t i = 0; i < N; i++) {
        fcas_conn one_more = v4(0x08000000 + i / 2);
        CHECK(fcas_source_enter(&engine, &one_more) == -1);
    }
    for (uint32_t i = 0; i < N; i++)
        fcas_source_leave(&engine, &conns[(uint64_t)i * 7919 % N]);
    CHECK(engine.n_sources == 0);
    free(conns);
}

int main(void)
{
    engine.source_secret[0] = 0x0706050403020100;
    cap();
    exempt();
    many();
    free(engine.sources);
    return 0;
}
