/* Writing past the page cache when the kernel does not do what it was asked for: short writes, errors, refused
 * submissions, lost completions, a stop with writes under way. A plain server gives 300 chunks, the last one odd; what
 * io_setup, io_submit, io_getevents and io_destroy answer is bent on the way (-Wl,--wrap=syscall), the writes are real.
 * Every chunk must be reported, the file must be right where a chunk was reported as right, nothing may be left.
 *
 * Mode "neighbours" asks nobody: chunks are handed to a settler in an order of its own, so that what is written
 * together is known.
 *
 * Prints "ok WRITES CHUNKS RIGHT FAILED": writes that the kernel took, the chunks in them, and how all chunks ended.
 * Usage: receiver_direct MODE FILE */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "receiver/internal.h"
#include "sha256/sha256.h"

enum { CHUNK = 16384, N = 300, LAST = 4096 + 777, CONNS = 3 };
#define SIZE ((size_t)(N - 1) * CHUNK + LAST)

static uint8_t content[SIZE], found[SIZE];
static uint8_t hashes[32 * N], midstates[32 * (N - 1)];
static const char *mode;
static atomic_int n_submits, n_writes, n_taken, n_reaps, n_waits;

static bool is(const char *name)
{
    return strcmp(mode, name) == 0;
}

long __real_syscall(long number, ...);

static long fail(int error)
{
    errno = error;
    return -1;
}

static long submit(long context, long n, struct iocb **ios)
{
    struct iocb copies[64], *to[64];
    int n_chunks[64];
    const int call = atomic_fetch_add(&n_submits, 1);
    if (is("refused") || (is("refused-at-times") && call % 2 == 0)) {
        return fail(is("refused") ? EINVAL : EAGAIN);
    }
    if (is("few")) {
        n = 1;
    }
    for (long i = 0; i < n; i++) {
        copies[i] = *ios[i];
        to[i] = &copies[i];
        n_chunks[i] = (int)copies[i].aio_nbytes; /* pieces of a vector */
        if (is("short") || is("error")) {
            copies[i].aio_nbytes /= 2; /* the second half is really missing */
        }
    }
    const long taken = __real_syscall(SYS_io_submit, context, n, to);
    for (long i = 0; i < taken; i++) {
        atomic_fetch_add(&n_writes, 1);
        atomic_fetch_add(&n_taken, n_chunks[i]);
    }
    return taken;
}

static long getevents(long context, long least, long most, struct io_event *events, void *timeout)
{
    const int call = atomic_fetch_add(&n_reaps, 1);
    if (least > 0) {
        atomic_fetch_add(&n_waits, 1);
    }
    if ((is("lost") || is("lost-for-good")) && call >= 2) {
        return fail(EINVAL);
    }
    if (is("interrupted") && call % 2 == 0) {
        return fail(EINTR);
    }
    if (is("slow") && atomic_load(&n_waits) == 0) {
        return 0; /* until all that may be under way is */
    }
    const long n = __real_syscall(SYS_io_getevents, context, least, most, events, timeout);
    for (long i = 0; i < n && is("error"); i++) {
        events[i].res = -EIO;
    }
    return n;
}

long __wrap_syscall(long number, ...)
{
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) {
        a[i] = va_arg(list, long);
    }
    va_end(list);
    switch (number) {
    case SYS_io_setup:
        return is("no-aio") ? fail(ENOSYS) : __real_syscall(number, a[0], a[1]);
    case SYS_io_submit:
        return submit(a[0], a[1], (struct iocb **)a[2]);
    case SYS_io_getevents:
        return getevents(a[0], a[1], a[2], (struct io_event *)a[3], (void *)a[4]);
    case SYS_io_destroy:
        if (is("lost-for-good")) {
            (void)__real_syscall(number, a[0]); /* the writes end before the buffers are checked for leaks */
            return fail(EINVAL);
        }
        return __real_syscall(number, a[0]);
    default:
        return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    }
}

static size_t length_of(unsigned i)
{
    return i == N - 1 ? LAST : CHUNK;
}

static bool send_all(int fd, const void *bytes, size_t n)
{
    for (const char *p = bytes; n > 0;) {
        const ssize_t sent = send(fd, p, n, MSG_NOSIGNAL);
        if (sent <= 0) {
            return false;
        }
        p += sent;
        n -= (size_t)sent;
    }
    return true;
}

static void *serve(void *argument)
{
    const int fd = (int)(intptr_t)argument;
    char in[65536];
    size_t have = 0;
    for (ssize_t n; (n = recv(fd, in + have, sizeof in - have, 0)) > 0;) {
        have += (size_t)n;
        for (char *end; (end = memmem(in, have, "\r\n\r\n", 4)) != NULL;) {
            char head[128];
            unsigned i = N;
            (void)sscanf(in, "GET /chunks/%u ", &i);
            const int length = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", length_of(i));
            if (i >= N || !send_all(fd, head, (size_t)length) || !send_all(fd, content + (size_t)i * CHUNK, length_of(i))) {
                goto out;
            }
            have -= (size_t)(end + 4 - in);
            memmove(in, end + 4, have);
        }
    }
out:
    close(fd);
    return NULL;
}

static void *accept_all(void *argument)
{
    pthread_t servers[CONNS];
    int n = 0;
    for (int fd; n < CONNS && (fd = accept((int)(intptr_t)argument, NULL, NULL)) >= 0; n++) {
        pthread_create(&servers[n], NULL, serve, (void *)(intptr_t)fd);
    }
    while (n > 0) {
        pthread_join(servers[--n], NULL);
    }
    return NULL;
}

static void prepare(uint8_t file_hash[32])
{
    unsigned seed = 1;
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
    fcas_sha256_final(&chain, file_hash);
}

/* Take what is finished; false: nothing came for 20 s. */
static bool take(fcas_rx *rx, int *right, int *failed, bool is_right[N])
{
    struct pollfd ready = {.fd = fcas_rx_eventfd(rx), .events = POLLIN};
    if (poll(&ready, 1, 20000) != 1) {
        return false;
    }
    for (fcas_rx_request *r = fcas_rx_take(rx); r != NULL;) {
        fcas_rx_request *next = r->next;
        if (r->outcome == FCAS_RX_OK) {
            ++*right;
            is_right[r->index] = true;
        } else if (r->outcome == FCAS_RX_WRITE_FAILED && r->sys_errno == EINVAL) {
            ++*failed;
        } else {
            fprintf(stderr, "chunk %u: outcome %d errno %d\n", r->index, r->outcome, r->sys_errno);
            exit(3);
        }
        fcas_rx_request_free(r);
        r = next;
    }
    return true;
}

/* Two runs of neighbours in disorder, two chunks alone, and the odd last one. */
static const unsigned handed[] = {7, 5, 6, 21, 9, 20, N - 1, 22, 23, 40};
enum { N_HANDED = sizeof handed / sizeof handed[0] };

static void settle(fcas_rx *rx, fcas_rx_job *job)
{
    fcas_rx_settler settler;
    if (fcas_rx_settler_init(&settler, rx) != FCAS_OK) {
        exit(2);
    }
    for (unsigned i = 0; i < N_HANDED; i++) {
        bool no_memory;
        fcas_rx_buffer *buffer = fcas_rx_pool_get(&rx->pool, CHUNK, &no_memory);
        fcas_rx_request *r = fcas_rx_request_new("/", 1);
        fcas_rx_job_hold(job);
        r->job = job;
        r->index = handed[i];
        r->length = length_of(handed[i]);
        memcpy(buffer->bytes, content + (size_t)handed[i] * CHUNK, length_of(handed[i]));
        fcas_rx_settler_add(&settler, r, buffer);
    }
    fcas_rx_settle(&settler);
    fcas_rx_settler_destroy(&settler);
}

int main(int argc, char **argv)
{
    fcas_rx_layout layout = {.size = SIZE, .chunk_size = CHUNK, .n_chunks = N, .hashes = hashes, .midstates = midstates,
                             .check_links = true};
    const fcas_rx_config config = {.n_threads = 1, .memory_max = (size_t)128 * CHUNK, .connect_ms = 5000,
                                   .first_byte_ms = 20000, .stall_ms = 20000};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n_address = sizeof address;
    bool is_right[N] = {false};
    int right = 0, failed = 0;
    pthread_t acceptor;
    fcas_rx_job *job;
    fcas_rx_conn *conns[CONNS];
    fcas_rx *rx;

    if (argc != 3) {
        return 64;
    }
    mode = argv[1];
    prepare(layout.file_hash);
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, n_address) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &n_address) != 0) {
        return 2;
    }
    pthread_create(&acceptor, NULL, accept_all, (void *)(intptr_t)listener);
    const int fd = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
    const int direct_fd = open(argv[2], O_WRONLY | O_DIRECT);
    if (fd < 0 || ftruncate(fd, SIZE) != 0 || fcas_rx_job_new(&layout, fd, direct_fd, -1, &job) != FCAS_OK ||
        fcas_rx_new(&config, &rx) != FCAS_OK) {
        return 2;
    }
    if (is("neighbours")) {
        settle(rx, job);
    }
    for (int i = 0; i < CONNS; i++) {
        conns[i] = fcas_rx_open(rx, (struct sockaddr *)&address, n_address, "x", "");
    }
    for (unsigned i = 0; i < N && !is("neighbours"); i++) {
        char target[32];
        const int n = snprintf(target, sizeof target, "/chunks/%u", i);
        fcas_rx_request *r = fcas_rx_request_new(target, (size_t)n);
        r->id = i;
        r->job = job;
        r->index = i;
        fcas_rx_submit(conns[i % CONNS], r);
    }
    while (right + failed < (is("stop") ? 1 : is("neighbours") ? N_HANDED : N)) {
        if (!take(rx, &right, &failed, is_right)) {
            fprintf(stderr, "%s: %d right, %d failed, and no more came\n", mode, right, failed);
            return 1;
        }
    }
    fcas_rx_free(rx);
    fcas_rx_job_release(job);
    if (pread(fd, found, SIZE, 0) != (ssize_t)SIZE) {
        return 2;
    }
    for (unsigned i = 0; i < N; i++) {
        if (is_right[i] && memcmp(found + (size_t)i * CHUNK, content + (size_t)i * CHUNK, length_of(i)) != 0) {
            fprintf(stderr, "%s: chunk %u was reported as right and is not\n", mode, i);
            return 1;
        }
    }
    shutdown(listener, SHUT_RDWR);
    close(listener);
    pthread_join(acceptor, NULL);
    close(fd);
    if (direct_fd >= 0) {
        close(direct_fd);
    }
    if (is("slow") && n_waits == 0) {
        return 1;
    }
    printf("ok %d %d %d %d\n", n_writes, n_taken, right, failed);
    return 0;
}
