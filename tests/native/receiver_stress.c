/* The receiver under thread and address sanitizers, without Python: three threads fetch a file of 400 chunks over 12
 * connections from a server that now and then lies, stalls, resets or closes; what failed is asked again, connections
 * are closed with requests out, and in the end the file must be right and nothing may be left.
 *
 * Prints "ok" and exits 0. Usage: receiver_stress SEED */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "receiver/receiver.h"
#include "sha256/sha256.h"

enum { CHUNK = 16384, N = 400, LAST = 777, CONNS = 12 };
#define SIZE ((size_t)(N - 1) * CHUNK + LAST)

static uint8_t content[SIZE];
static uint8_t hashes[32 * N], midstates[32 * (N - 1)];
static unsigned seed_base;

static size_t length_of(unsigned i)
{
    return i == N - 1 ? LAST : CHUNK;
}

static void *serve(void *argument)
{
    const int fd = (int)(intptr_t)argument;
    unsigned seed = seed_base + (unsigned)fd;
    char in[8192];
    size_t have = 0;
    for (;;) {
        const ssize_t n = recv(fd, in + have, sizeof in - have, 0);
        if (n <= 0) {
            break;
        }
        have += (size_t)n;
        char *end;
        while ((end = memmem(in, have, "\r\n\r\n", 4)) != NULL) {
            char hex[65], head[128];
            if (sscanf(in, "GET /chunks/%64[0-9a-f] ", hex) != 1) {
                goto out;
            }
            unsigned i;
            for (i = 0; i < N; i++) {
                char mine[65];
                for (int b = 0; b < 4; b++) {
                    sprintf(mine + 2 * b, "%02x", hashes[32 * i + (unsigned)b]);
                }
                if (memcmp(mine, hex, 8) == 0) {
                    break;
                }
            }
            have -= (size_t)(end + 4 - in);
            memmove(in, end + 4, have);
            const int mood = rand_r(&seed) % 40;
            const int length = sprintf(head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", length_of(i));
            uint8_t body[CHUNK];
            memcpy(body, content + (size_t)i * CHUNK, length_of(i));
            body[0] ^= mood == 0;
            if (mood == 1 || send(fd, head, (size_t)length, MSG_NOSIGNAL) < 0) {
                goto out;
            }
            if (send(fd, body, mood == 2 ? length_of(i) / 2 : length_of(i), MSG_NOSIGNAL) < 0 || mood == 2) {
                goto out;
            }
        }
    }
out:
    close(fd);
    return NULL;
}

static void *accept_all(void *argument)
{
    const int listener = (int)(intptr_t)argument;
    for (;;) {
        const int fd = accept(listener, NULL, NULL);
        if (fd < 0) {
            return NULL;
        }
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) == 0) {
            pthread_detach(thread);
        }
    }
}

static void prepare(void)
{
    unsigned seed = seed_base;
    fcas_sha256 chain;
    for (size_t i = 0; i < SIZE; i++) {
        content[i] = (uint8_t)rand_r(&seed);
    }
    fcas_sha256_init(&chain, NULL);
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
}

static void ask(fcas_rx_conn *conn, fcas_rx_job *job, unsigned i)
{
    char target[80] = "/chunks/";
    for (unsigned b = 0; b < 32; b++) {
        sprintf(target + 8 + 2 * b, "%02x", hashes[32 * i + b]);
    }
    fcas_rx_request *r = fcas_rx_request_new(target, strlen(target));
    r->id = i;
    r->job = job;
    r->index = i;
    fcas_rx_submit(conn, r);
}

int main(int argc, char **argv)
{
    seed_base = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
    prepare();
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n_address = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, n_address) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &n_address) != 0) {
        return 2;
    }
    pthread_t acceptor;
    pthread_create(&acceptor, NULL, accept_all, (void *)(intptr_t)listener);

    const int fd = memfd_create("out", MFD_CLOEXEC);
    fcas_rx_layout layout = {.size = SIZE, .chunk_size = CHUNK, .n_chunks = N, .hashes = hashes, .midstates = midstates,
                             .check_links = true};
    fcas_sha256 whole;
    fcas_sha256_init(&whole, NULL);
    fcas_sha256_update(&whole, content, SIZE);
    fcas_sha256_final(&whole, layout.file_hash);
    fcas_rx_job *job;
    fcas_rx *rx;
    const fcas_rx_config config = {
        .n_threads = 3, .memory_max = 5 * CHUNK, .connect_ms = 2000, .first_byte_ms = 2000, .stall_ms = 2000};
    if (fcas_rx_job_new(&layout, fd, -1, -1, &job) != FCAS_OK || fcas_rx_new(&config, &rx) != FCAS_OK) {
        return 3;
    }
    fcas_rx_conn *conns[CONNS];
    for (int c = 0; c < CONNS; c++) {
        conns[c] = fcas_rx_open(rx, (struct sockaddr *)&address, sizeof address, "localhost", "");
    }
    for (unsigned i = 0; i < N; i++) {
        ask(conns[i % CONNS], job, i);
    }
    unsigned done = 0, asked = N, n_closed = 0, seed = seed_base;
    while (done < N) {
        struct pollfd p = {.fd = fcas_rx_eventfd(rx), .events = POLLIN};
        if (poll(&p, 1, 20000) != 1) {
            return 4;
        }
        for (fcas_rx_request *r = fcas_rx_take(rx); r != NULL;) {
            fcas_rx_request *next = r->next;
            if (r->outcome == FCAS_RX_OK) {
                done++;
                if ((r->flags & FCAS_RX_LINK_OK) == 0) {
                    return 5;
                }
            } else {
                const unsigned c = (unsigned)rand_r(&seed) % CONNS;
                /* Only for what the server did: were a connection closed for requests that our own closing has ended,
                 * each closing would bring about three more, faster than a busy machine serves chunks. */
                const bool was_ours = r->outcome == FCAS_RX_CANCELLED || r->outcome == FCAS_RX_LOST;
                if (!was_ours && rand_r(&seed) % 3 == 0) {
                    n_closed++;
                    fcas_rx_close(conns[c]);
                    conns[c] = fcas_rx_open(rx, (struct sockaddr *)&address, sizeof address, "localhost", "");
                }
                ask(conns[c], job, (unsigned)r->id);
                asked++;
            }
            fcas_rx_request_free(r);
            r = next;
        }
    }
    if (n_closed == 0) {
        return 7;
    }
    for (unsigned i = 0; i < 50; i++) {
        ask(conns[i % CONNS], job, i); /* still out when the receiver ends */
    }
    fcas_rx_free(rx);
    fcas_rx_job_release(job);
    const uint8_t *got = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
    if (got == MAP_FAILED || memcmp(got, content, SIZE) != 0) {
        return 6;
    }
    shutdown(listener, SHUT_RDWR);
    close(listener);
    pthread_join(acceptor, NULL);
    printf("ok %u requests, %u connections closed by us\n", asked, n_closed);
    return 0;
}
