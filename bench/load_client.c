/* Load client of bench/serve.py: keep-alive connections to 127.0.0.1 that GET the paths of a list in turn and check
 * every response's status and length.
 *
 *   load_client PORT PATHS_FILE CONNECTIONS SECONDS EXPECTED_BYTES DISCARD
 *
 * PATHS_FILE has one path a line, maybe with " FIRST-LAST" behind it: then that range is asked for. DISCARD 1
 * lets the kernel drop the bodies (MSG_TRUNC), so that the client takes as little CPU as possible; 0 copies them, as a
 * real receiver does. Prints one JSON object: requests, bytes, seconds, and the latency's p50 and p99 in microseconds.
 * Exit 1 with a line on stderr when a response is not as expected. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD_MAX   4096
#define FIRST_MAX  16384 /* the first call for a response: its head, and all of a small body */
#define BODY_CHUNK (1 << 20)
#define BUCKETS    100000 /* of 10 us */

typedef struct {
    int     fd;
    int     in_body;
    size_t  head_len;
    int64_t body_left;
    int64_t asked_ns;
    char    head[HEAD_MAX];
} client;

static char   **requests;
static size_t  *request_len;
static size_t   n_requests, next_request;
static char     body[BODY_CHUNK];
static uint32_t latency[BUCKETS + 1];

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void fail(const char *what, const char *detail)
{
    fprintf(stderr, "load_client: %s: %.200s\n", what, detail);
    exit(1);
}

static void load_paths(const char *file)
{
    FILE *f = fopen(file, "r");
    char  line[512], text[1024];
    if (!f)
        fail(file, strerror(errno));
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *range = strchr(line, ' ');
        if (range)
            *range++ = 0;
        int n = snprintf(text, sizeof text, "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n%s%s%s\r\n", line,
                         range ? "Range: bytes=" : "", range ? range : "", range ? "\r\n" : "");
        requests = realloc(requests, (n_requests + 1) * sizeof *requests);
        request_len = realloc(request_len, (n_requests + 1) * sizeof *request_len);
        if (!requests || !request_len || !(requests[n_requests] = strdup(text)))
            fail("paths", "no memory");
        request_len[n_requests++] = (size_t)n;
    }
    fclose(f);
    if (n_requests == 0)
        fail(file, "no paths");
}

static void ask(client *c)
{
    size_t i = next_request++ % n_requests;
    c->asked_ns = now_ns();
    if (send(c->fd, requests[i], request_len[i], MSG_NOSIGNAL) != (ssize_t)request_len[i])
        fail("send", strerror(errno));
}

/* Receive the head and what came with it: one call for a small response, so that the client is not what is measured.
 * Up to `room` bytes go to `into`. 1 = the body began, 0 = not yet. */
static int read_head(client *c, char *into, size_t room, int64_t expected, uint64_t *bytes)
{
    memcpy(into, c->head, c->head_len);
    ssize_t n = recv(c->fd, into + c->head_len, room - c->head_len, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return 0;
    if (n <= 0)
        fail("connection ended", n < 0 ? strerror(errno) : "before a response");
    size_t have = c->head_len + (size_t)n, seen = have < HEAD_MAX ? have : HEAD_MAX;
    char  *end = memmem(into, seen, "\r\n\r\n", 4);
    if (!end) {
        if (seen == HEAD_MAX)
            fail("unexpected response", "a head without an end");
        memcpy(c->head, into, have);
        c->head_len = have;
        return 0;
    }
    *end = 0;
    char *length = strcasestr(into, "\r\ncontent-length:");
    if ((memcmp(into, "HTTP/1.1 200", 12) != 0 && memcmp(into, "HTTP/1.1 206", 12) != 0) || !length ||
        atoll(length + 17) != expected)
        fail("unexpected response", into);
    int64_t begun = (int64_t)have - (end + 4 - into);
    if (begun > expected)
        fail("unexpected response", "longer than its Content-Length");
    *bytes += (uint64_t)begun;
    c->body_left = expected - begun;
    c->head_len = 0;
    c->in_body = 1;
    return 1;
}

static int by_percentile(double p, uint64_t total)
{
    uint64_t seen = 0;
    for (int i = 0; i <= BUCKETS; i++) {
        seen += latency[i];
        if ((double)seen >= p * (double)total)
            return i * 10;
    }
    return BUCKETS * 10;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        fail("usage", "PORT PATHS_FILE CONNECTIONS SECONDS EXPECTED_BYTES DISCARD");
    int     port = atoi(argv[1]), n = atoi(argv[3]), one = 1, flags = MSG_DONTWAIT | (atoi(argv[6]) ? MSG_TRUNC : 0);
    int64_t expected = atoll(argv[5]), duration = (int64_t)(atof(argv[4]) * 1e9);
    size_t  room = atoi(argv[6]) ? HEAD_MAX : FIRST_MAX;
    load_paths(argv[2]);
    int     ep = epoll_create1(0);
    client *clients = calloc((size_t)n, sizeof *clients);
    if (ep < 0 || !clients)
        fail("start", "no memory");
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < n; i++) {
        clients[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(clients[i].fd, (struct sockaddr *)&to, sizeof to) != 0)
            fail("connect", strerror(errno));
        setsockopt(clients[i].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &clients[i]};
        epoll_ctl(ep, EPOLL_CTL_ADD, clients[i].fd, &event);
    }
    int64_t  start = now_ns();
    uint64_t done = 0, bytes = 0;
    for (int i = 0; i < n; i++)
        ask(&clients[i]);
    while (now_ns() - start < duration) {
        struct epoll_event events[256];
        int                ready = epoll_wait(ep, events, 256, 100);
        for (int j = 0; j < ready; j++) {
            client *c = events[j].data.ptr;
            if (!c->in_body && !read_head(c, body, room, expected, &bytes))
                continue;
            while (c->body_left > 0) {
                size_t  want = c->body_left < BODY_CHUNK ? (size_t)c->body_left : BODY_CHUNK;
                ssize_t got = recv(c->fd, body, want, flags);
                if (got < 0 && errno == EAGAIN)
                    break;
                if (got <= 0)
                    fail("connection ended", "inside a body");
                c->body_left -= got;
                bytes += (uint64_t)got;
            }
            if (c->body_left == 0) {
                int64_t took = (now_ns() - c->asked_ns) / 10000;
                latency[took < BUCKETS ? took : BUCKETS]++;
                done++;
                c->in_body = 0;
                ask(c);
            }
        }
    }
    double seconds = (double)(now_ns() - start) / 1e9;
    printf("{\"requests\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"p50_us\": %d, \"p99_us\": %d}\n",
           (unsigned long long)done, (unsigned long long)bytes, seconds, by_percentile(0.5, done),
           by_percentile(0.99, done));
    return 0;
}
