/* The receiver against a server that spoils valid answers at random, and its response parser against mutated heads,
 * under sanitizers.
 *
 *   receiver_mutations SEED ROUNDS
 *
 * The server changes, removes and inserts bytes anywhere in an answer, also in its head, sends it in pieces,
 * too early, twice, or half, and closes or resets. Checked: every request comes back exactly once, what is OK is
 * right, and nothing but right bytes is ever in the file. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "receiver/receiver.h"
#include "sha256/sha256.h"

enum { CHUNK = 16384, N = 5, LAST = 777, CONNS = 8, SERVED = 64 };
#define SIZE ((size_t)(N - 1) * CHUNK + LAST)

static uint8_t     content[SIZE];
static uint8_t     hashes[32 * N], midstates[32 * (N - 1)];
static atomic_bool stop;

static unsigned rnd(unsigned *state, unsigned below)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state % below;
}

static size_t length_of(unsigned i)
{
    return i == N - 1 ? LAST : CHUNK;
}

/* A valid answer for chunk i, then spoilt; out has room for 2 * CHUNK. */
static size_t make_answer(unsigned *seed, unsigned i, char *out)
{
    static const char *const STATUS[] = {"204 No Content", "404 Not Found", "503 Busy",
                                         "302 Found", "100 Continue", "599 x"};
    static const char *const EXTRA[] = {"Connection: close\r\n", "X-Fastcas-Chunk: 2\r\n",
                                        "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "X:\r\n",
                                        "X-Fastcas-Chunk: 4294967295\r\n", "Content-Encoding: gzip\r\n", " folded\r\n"};
    const char *status = rnd(seed, 10) ? "200 OK" : STATUS[rnd(seed, 6)];
    const size_t length = status[0] == '2' && status[2] == '0' ? length_of(i) : status[2] == '4' ? 0 : 5;
    size_t n = (size_t)sprintf(out, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nX-Fastcas-Chunk: %u\r\n%s\r\n", status,
                               rnd(seed, 20) ? length : (size_t)rnd(seed, 100000), i, rnd(seed, 8) ? "" : EXTRA[rnd(seed, 8)]);
    const size_t n_head = n;
    memcpy(out + n, content + (size_t)i * CHUNK, length);
    n += length;
    for (unsigned k = rnd(seed, 6) ? 0 : 1 + rnd(seed, 3); k > 0; k--) {
        const size_t at = rnd(seed, (unsigned)(rnd(seed, 2) && n_head < n ? n_head : n));
        switch (rnd(seed, 4)) {
        case 0:
            out[at] = (char)rnd(seed, 256);
            break;
        case 1:
            out[at] ^= (char)(1u << rnd(seed, 8));
            break;
        case 2:
            memmove(out + at + 1, out + at, n - at);
            out[at] = "\r\n\0: 9"[rnd(seed, 6)];
            n++;
            break;
        default:
            memmove(out + at, out + at + 1, n - at - 1);
            n--;
        }
    }
    return rnd(seed, 20) ? n : rnd(seed, (unsigned)n);
}

typedef struct {
    int fd;
    size_t have;
    char in[4096];
} served;

static int spoil(unsigned *seed, int fd, unsigned i)
{
    static char out[3 * CHUNK];
    size_t n = make_answer(seed, rnd(seed, 20) ? i : rnd(seed, N), out);
    for (size_t at = 0; at < n;) {
        size_t part = rnd(seed, 3) ? n - at : 1 + rnd(seed, 400);
        part = part < n - at ? part : n - at;
        const ssize_t sent = send(fd, out + at, part, MSG_NOSIGNAL);
        if (sent <= 0) {
            return -1;
        }
        at += (size_t)sent;
    }
    return rnd(seed, 30) ? 0 : -1;
}

static void answer(unsigned *seed, served *s)
{
    char *end;
    const ssize_t n = recv(s->fd, s->in + s->have, sizeof s->in - s->have, 0);
    int over = n <= 0;
    s->have += n > 0 ? (size_t)n : 0;
    while (!over && (end = memmem(s->in, s->have, "\r\n\r\n", 4)) != NULL) {
        const unsigned i = (unsigned)(s->in[5] - '0'); /* "GET /3 HTTP/1.1" */
        s->have -= (size_t)(end + 4 - s->in);
        memmove(s->in, end + 4, s->have);
        over = i >= N || spoil(seed, s->fd, i) != 0 || (rnd(seed, 60) == 0 && spoil(seed, s->fd, i) != 0);
    }
    if (over) {
        struct linger now = {.l_onoff = 1, .l_linger = 0};
        if (rnd(seed, 2)) {
            setsockopt(s->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        }
        close(s->fd);
        s->fd = -1;
        s->have = 0;
    }
}

static int      listener;
static unsigned server_seed;

static void *serve(void *unused)
{
    static served all[SERVED];
    unsigned seed = server_seed;
    (void)unused;
    for (int i = 0; i < SERVED; i++) {
        all[i].fd = -1;
    }
    while (!atomic_load(&stop)) {
        struct pollfd polled[SERVED + 1];
        polled[0] = (struct pollfd){.fd = listener, .events = POLLIN};
        for (int i = 0; i < SERVED; i++) {
            polled[i + 1] = (struct pollfd){.fd = all[i].fd, .events = POLLIN};
        }
        if (poll(polled, SERVED + 1, 20) <= 0) {
            continue;
        }
        for (int i = 0; i < SERVED; i++) {
            if (polled[i + 1].fd >= 0 && polled[i + 1].revents) {
                answer(&seed, &all[i]);
            } else if (all[i].fd < 0 && polled[0].revents) {
                const struct timeval patience = {.tv_sec = 5};
                all[i].fd = accept(listener, NULL, NULL);
                setsockopt(all[i].fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
                polled[0].revents = 0;
            }
        }
    }
    for (int i = 0; i < SERVED; i++) {
        if (all[i].fd >= 0) {
            close(all[i].fd);
        }
    }
    return NULL;
}

static void parse_mutations(unsigned *seed, unsigned rounds)
{
    static char out[3 * CHUNK];
    for (unsigned k = 0; k < rounds; k++) {
        const size_t whole = make_answer(seed, rnd(seed, N), out);
        fcas_rx_response a, b;
        size_t n = whole < 400 ? whole : 400;
        uint8_t *copy = malloc(n + 1); /* exact, so that a read past the end is seen */
        if (n == 0 || copy == NULL) {
            free(copy);
            continue;
        }
        int result = 0;
        for (size_t part = 1; part <= n && result == 0; part++) {
            uint8_t *piece = malloc(part);
            memcpy(piece, out, part);
            result = fcas_rx_parse_response(piece, part, &a);
            free(piece);
        }
        memcpy(copy, out, n);
        if (fcas_rx_parse_response(copy, n, &b) != result || (result == 1 && (a.length != b.length || a.n_head != b.n_head))) {
            fprintf(stderr, "a head cut in pieces means something else\n");
            exit(7);
        }
        free(copy);
    }
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        return 64;
    }
    unsigned seed = (unsigned)atoi(argv[1]) * 2654435761u | 1u;
    const unsigned rounds = (unsigned)atoi(argv[2]);
    fcas_rx_layout layout = {.size = SIZE, .chunk_size = CHUNK, .n_chunks = N, .hashes = hashes, .midstates = midstates,
                             .check_links = true};
    fcas_sha256 chain;
    fcas_sha256_init(&chain, NULL);
    for (size_t i = 0; i < SIZE; i++) {
        content[i] = (uint8_t)rnd(&seed, 256);
    }
    for (unsigned i = 0; i < N; i++) {
        fcas_sha256 own;
        fcas_sha256_init(&own, NULL);
        fcas_sha256_update(&own, content + (size_t)i * CHUNK, length_of(i));
        fcas_sha256_final(&own, hashes + 32 * i);
        fcas_sha256_update(&chain, content + (size_t)i * CHUNK, length_of(i));
        if (i < N - 1) {
            (void)fcas_sha256_midstate(&chain, midstates + 32 * i);
        }
    }
    fcas_sha256_final(&chain, layout.file_hash);
    parse_mutations(&seed, 3000);

    listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n_address = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, n_address) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &n_address) != 0) {
        return 2;
    }
    pthread_t server;
    server_seed = seed;
    pthread_create(&server, NULL, serve, NULL);

    const int fd = memfd_create("out", MFD_CLOEXEC);
    fcas_rx_job *job;
    fcas_rx *rx;
    const fcas_rx_config config = {
        .n_threads = 2, .memory_max = 3 * CHUNK, .connect_ms = 2000, .first_byte_ms = 150, .stall_ms = 150};
    if (ftruncate(fd, (off_t)SIZE) != 0 || fcas_rx_job_new(&layout, fd, -1, -1, &job) != FCAS_OK ||
        fcas_rx_new(&config, &rx) != FCAS_OK) {
        return 3;
    }
    fcas_rx_conn *conns[CONNS] = {NULL};
    unsigned asked = 0, back = 0, right = 0;
    while (back < rounds) {
        while (asked < rounds && asked - back < 40) {
            const unsigned c = rnd(&seed, CONNS), kind = rnd(&seed, 8), i = rnd(&seed, N);
            if (conns[c] != NULL && rnd(&seed, 25) == 0) {
                fcas_rx_close(conns[c]);
                conns[c] = NULL;
            }
            if (conns[c] == NULL) {
                conns[c] = fcas_rx_open(rx, (struct sockaddr *)&address, sizeof address, "localhost", "");
            }
            const char target[2] = {'/', (char)('0' + i)};
            fcas_rx_request *r = fcas_rx_request_new(target, sizeof target);
            r->id = asked++;
            if (kind < 2) { /* into memory, with a hash or without */
                r->max_length = rnd(&seed, 20000);
                r->has_hash = kind == 0;
                memcpy(r->hash, hashes + 32 * i, 32);
            } else {
                r->job = job;
                r->index = kind == 2 ? FCAS_RX_ANY_INDEX : i;
            }
            fcas_rx_submit(conns[c], r);
        }
        struct pollfd p = {.fd = fcas_rx_eventfd(rx), .events = POLLIN};
        if (poll(&p, 1, 20000) != 1) {
            fprintf(stderr, "%u of %u came back, then nothing\n", back, asked);
            return 4;
        }
        for (fcas_rx_request *r = fcas_rx_take(rx); r != NULL;) {
            fcas_rx_request *next = r->next;
            back++;
            if (r->outcome == FCAS_RX_OK && r->job != NULL) {
                right++;
                if (r->index >= N || (r->flags & FCAS_RX_LINK_OK) == 0 || r->length != length_of(r->index)) {
                    return 5;
                }
            }
            fcas_rx_request_free(r);
            r = next;
        }
    }
    if (fcas_rx_memory(rx) > config.memory_max) {
        return 8;
    }
    fcas_rx_free(rx);
    fcas_rx_job_release(job);
    uint8_t *got = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
    static const uint8_t nothing[CHUNK];
    for (unsigned i = 0; i < N; i++) {
        const size_t at = (size_t)i * CHUNK;
        if (memcmp(got + at, content + at, length_of(i)) != 0 && memcmp(got + at, nothing, length_of(i)) != 0) {
            return 6;
        }
    }
    munmap(got, SIZE);
    close(fd);
    atomic_store(&stop, true);
    pthread_join(server, NULL);
    close(listener);
    printf("ok: %u of %u right\n", right, back);
    return right > 0 ? 0 : 9;
}
