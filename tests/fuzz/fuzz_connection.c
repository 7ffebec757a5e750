/* Fuzz target: the whole serve engine with up to three clients on a unix listener, its clock and its faults ours.
 *
 * Input: byte 0 chooses the send path, upload slots, an upload limit and small buffers, then the bytes that clients
 * send, with controls among them: 0xff and
 *   r N  run the engine for N events        R N  the client reads up to 64 * (N + 1) bytes
 *   t N  N quarter seconds pass, tick       a N  the owner answers the oldest parked request, in manner N
 *   h    half-close                         x    hang up, call again with the next byte
 *   c N  another client is meant from here  f N  the next system call of kind N & 3 fails in manner N >> 2
 *   d N  a chunk goes (N even) or all come back in a new table         D  drain
 *   0xff one byte 0xff. Anything else after 0xff is dropped.
 *
 * Checked beside the sanitizers: a client gets at most one response per request, in order, none after an error or a
 * Connection: close, each well-formed, with the status that the parser gives and the bytes of the content; left
 * alone, every request is answered; in the end nothing is held. Links with libFuzzer or with replay.c, both with
 * --wrap for the system calls. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "engine/engine.h"
#include "http/parser.h"

#define CHUNK_SIZE 16384u
#define FILE_SIZE  (2 * CHUNK_SIZE + 5000u)
#define N_CHUNKS   3u
#define N_CLIENTS  3u
#define SENT_MAX   20000u
#define GOT_MAX    (1u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int __real_accept4(int fd, struct sockaddr *from, socklen_t *from_len, int flags);
ssize_t __real_recv(int fd, void *bytes, size_t n, int flags);
ssize_t __real_send(int fd, const void *bytes, size_t n, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __real_sendfile(int to, int from, off_t *at, size_t n);
int __wrap_accept4(int fd, struct sockaddr *from, socklen_t *from_len, int flags);
ssize_t __wrap_recv(int fd, void *bytes, size_t n, int flags);
ssize_t __wrap_send(int fd, const void *bytes, size_t n, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_sendfile(int to, int from, off_t *at, size_t n);

static void require(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "fuzz_connection: %s\n", what);
        abort();
    }
}

/* ---- system calls that fail ---- */

enum { CALL_RECV, CALL_SEND, CALL_SENDFILE, CALL_ACCEPT, N_CALLS };
enum { FAULT_NONE, FAULT_EINTR, FAULT_EAGAIN, FAULT_EIO, FAULT_ENOMEM, FAULT_ZERO, FAULT_SHORT, N_FAULTS };

static uint8_t fault[N_CALLS];
static int     small_buffer; /* accepted sockets take little, so that sending blocks */

static int take_fault(int call)
{
    static const int ERRORS[] = {0, EINTR, EAGAIN, EIO, ENOMEM};
    int              kind = fault[call];
    fault[call] = FAULT_NONE;
    if (kind < FAULT_ZERO)
        errno = ERRORS[kind];
    return kind;
}

int __wrap_accept4(int fd, struct sockaddr *from, socklen_t *from_len, int flags)
{
    int kind = take_fault(CALL_ACCEPT);
    if (kind != FAULT_NONE) {
        errno = kind == FAULT_ENOMEM ? EMFILE : kind < FAULT_ZERO ? errno : ECONNABORTED;
        return -1;
    }
    int                small = 4608, got = __real_accept4(fd, NULL, NULL, flags);
    struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(1), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (got >= 0 && small_buffer)
        setsockopt(got, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    if (got >= 0 && from) {
        memcpy(from, &local, sizeof local);
        *from_len = sizeof local;
    }
    return got;
}

ssize_t __wrap_recv(int fd, void *bytes, size_t n, int flags)
{
    int kind = take_fault(CALL_RECV);
    if (kind == FAULT_SHORT)
        n = n > 3 ? 3 : n;
    else if (kind != FAULT_NONE && kind != FAULT_ZERO)
        return -1;
    return __real_recv(fd, bytes, n, flags);
}

ssize_t __wrap_send(int fd, const void *bytes, size_t n, int flags)
{
    int kind = take_fault(CALL_SEND);
    if (kind == FAULT_SHORT)
        n = n > 7 ? 7 : n;
    else if (kind != FAULT_NONE && kind != FAULT_ZERO)
        return -1;
    return __real_send(fd, bytes, n, flags);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
    int kind = take_fault(CALL_SEND);
    if (kind == FAULT_SHORT)
        return __real_send(fd, message->msg_iov[0].iov_base, message->msg_iov[0].iov_len > 7 ? 7 : 1, flags);
    if (kind == FAULT_ZERO)
        errno = EFAULT;
    return kind == FAULT_NONE ? __real_sendmsg(fd, message, flags) : -1;
}

ssize_t __wrap_sendfile(int to, int from, off_t *at, size_t n)
{
    int kind = take_fault(CALL_SENDFILE);
    if (kind == FAULT_ZERO)
        return 0;
    if (kind == FAULT_SHORT)
        n = n > 7 ? 7 : n;
    return kind == FAULT_NONE || kind == FAULT_SHORT ? __real_sendfile(to, from, at, n) : -1;
}

/* ---- content ---- */

static uint8_t            content[FILE_SIZE];
static char               folder[64], blob_path[80], manifest_path[80];
static struct sockaddr_un address;
static fcas_table         writer;
static int                table_fd = -1;

static void chunk_key(uint32_t i, uint8_t key[32])
{
    memset(key, 0xcc, 32);
    key[31] = (uint8_t)i;
}

static uint32_t chunk_length(uint32_t i)
{
    return i + 1 < N_CHUNKS ? CHUNK_SIZE : FILE_SIZE - i * CHUNK_SIZE;
}

static void write_file(const char *path, const void *bytes, size_t n)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    require(fd >= 0 && write(fd, bytes, n) == (ssize_t)n, "cannot write a blob");
    close(fd);
}

static void list_blob(uint32_t number, const char *path)
{
    struct stat st;
    require(stat(path, &st) == 0, "no blob");
    fcas_blob entry = {.device = (uint64_t)st.st_dev, .inode = (uint64_t)st.st_ino, .size = (uint64_t)st.st_size,
                       .mtime_ns = (int64_t)st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec};
    require(fcas_table_put_blob(&writer, number, &entry, path, strlen(path)) == FCAS_OK, "put_blob");
}

static void new_table(fcas_engine *e)
{
    static uint64_t number;
    static const uint8_t secret[16] = {7};
    uint8_t              key[32], file_hash[32];
    fcas_table_unmap(&writer);
    if (table_fd >= 0)
        close(table_fd);
    table_fd = memfd_create("table", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    require(fcas_table_create(&writer, table_fd, 64, 8, 4096, secret) == FCAS_OK, "table_create");
    list_blob(0, blob_path);
    list_blob(1, manifest_path);
    for (uint32_t i = 0; i < N_CHUNKS; i++) {
        chunk_key(i, key);
        fcas_place place = {.offset = (uint64_t)i * CHUNK_SIZE, .length = chunk_length(i), .blob = 0};
        require(fcas_table_put(&writer, FCAS_ENTRY_CHUNK, key, place) == FCAS_OK, "put chunk");
    }
    fcas_place manifest = {.offset = 0, .length = 64 + 32 * N_CHUNKS, .blob = 1};
    memset(key, 0xaa, 32);
    memset(file_hash, 0xff, 32);
    require(fcas_table_put(&writer, FCAS_ENTRY_MANIFEST, key, manifest) == FCAS_OK &&
                fcas_table_put_file(&writer, file_hash, key) == FCAS_OK,
            "put manifest");
    require(fcas_engine_set_table(e, table_fd, ++number) == FCAS_OK, "set_table");
}

static void set_up(void)
{
    uint8_t  manifest[64 + 32 * N_CHUNKS] = "FCASMAN1\1";
    uint32_t chunk = CHUNK_SIZE, n = N_CHUNKS;
    uint64_t size = FILE_SIZE;
    signal(SIGPIPE, SIG_IGN);
    snprintf(folder, sizeof folder, "/tmp/fuzz_connection.XXXXXX");
    require(mkdtemp(folder) != NULL, "mkdtemp");
    snprintf(blob_path, sizeof blob_path, "%s/blob", folder);
    snprintf(manifest_path, sizeof manifest_path, "%s/manifest", folder);
    for (uint32_t i = 0; i < FILE_SIZE; i++)
        content[i] = (uint8_t)((i * 2654435761u) >> 24);
    memcpy(manifest + 12, &chunk, 4);
    memcpy(manifest + 16, &size, 8);
    memcpy(manifest + 24, &n, 4);
    memset(manifest + 32, 0xff, 32);
    for (uint32_t i = 0; i < N_CHUNKS; i++)
        chunk_key(i, manifest + 64 + 32 * i);
    write_file(blob_path, content, sizeof content);
    write_file(manifest_path, manifest, sizeof manifest);
    address.sun_family = AF_UNIX;
    snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "fuzz_connection.%d", (int)getpid());
}

static void tear_down(void)
{
    unlink(blob_path);
    unlink(manifest_path);
    rmdir(folder);
}

/* ---- clients ---- */

typedef struct {
    int      fd;
    int      eof;
    size_t   sent_n, got_n;
    uint8_t  sent[SENT_MAX];
    uint8_t *got;
} client;

static client clients[N_CLIENTS];

static void call(client *c)
{
    socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address.sun_path + 1));
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    require(c->fd >= 0, "socket");
    if (connect(c->fd, (struct sockaddr *)&address, length) != 0) { /* the engine has not accepted for a while */
        require(errno == EAGAIN, "connect");
        close(c->fd);
        c->fd = -1;
    }
    c->sent_n = c->got_n = 0;
    c->eof = 0;
}

static void read_some(client *c, size_t most)
{
    while (most && c->fd >= 0 && !c->eof) {
        size_t  room = GOT_MAX - c->got_n;
        ssize_t n = __real_recv(c->fd, c->got + c->got_n, room < most ? room : most, 0);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            c->eof = 1;
            return;
        }
        c->got_n += (size_t)n;
        most -= (size_t)n;
        if (c->got_n == GOT_MAX)
            return;
    }
}

static void write_some(client *c, const uint8_t *bytes, size_t n)
{
    n = n < SENT_MAX - c->sent_n ? n : SENT_MAX - c->sent_n;
    if (!n || c->fd < 0)
        return;
    ssize_t sent = __real_send(c->fd, bytes, n, MSG_NOSIGNAL);
    if (sent > 0) {
        memcpy(c->sent + c->sent_n, bytes, (size_t)sent);
        c->sent_n += (size_t)sent;
    }
}

/* ---- what came back ---- */

static const uint8_t *body_of(const uint8_t *request, const fcas_http_request *r, uint64_t *size)
{
    static const char HEX[] = "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc0";
    const char       *path = (const char *)request + r->path.at;
    if (r->path.len == 8 + 64 && memcmp(path, "/chunks/", 8) == 0 && memcmp(path + 8, HEX, 63) == 0) {
        uint32_t i = (uint32_t)(path[71] - '0');
        require(i < N_CHUNKS, "an unknown chunk is served");
        *size = chunk_length(i);
        return content + i * CHUNK_SIZE;
    }
    if (r->path.len == 7 + 64 && memcmp(path, "/files/f", 8) == 0) {
        *size = FILE_SIZE;
        return content;
    }
    return NULL;
}

/* One response at `at`: its length, or 0 when it is not all there; *status is 0 until its head is. */
static size_t check_response(const client *c, size_t at, const uint8_t *request, const fcas_http_request *r,
                             int *status, int *closes)
{
    char   head[2048];
    size_t left = c->got_n - at, head_n = left < sizeof head - 1 ? left : sizeof head - 1;
    memcpy(head, c->got + at, head_n);
    head[head_n] = 0;
    require(head_n < 9 ? memcmp(head, "HTTP/1.1 ", head_n) == 0 : memcmp(head, "HTTP/1.1 ", 9) == 0, "no status line");
    char *end = strstr(head, "\r\n\r\n");
    *status = 0;
    if (!end) {
        require(head_n < sizeof head - 1, "endless head");
        return 0;
    }
    end[2] = 0;
    *status = atoi(head + 9);
    *closes = strstr(head, "\r\nConnection: close\r\n") != NULL;
    const char *length = strstr(head, "\r\nContent-Length: ");
    require(*status >= 200 && *status < 600 && (length || *status == 204 || *status == 304), "malformed head");
    uint64_t body = length && *status != 304 && r->method != FCAS_HTTP_HEAD ? strtoull(length + 18, NULL, 10) : 0;
    size_t   body_at = at + (size_t)(end - head) + 4, have = c->got_n - body_at;
    uint64_t size = 0, first = 0;
    const uint8_t *want = (*status == 200 || *status == 206) && body ? body_of(request, r, &size) : NULL;
    if (want) {
        const char *range = strstr(head, "\r\nContent-Range: bytes ");
        require((range != NULL) == (*status == 206), "Content-Range");
        if (range)
            first = strtoull(range + 23, NULL, 10);
        require(first + body <= size && (range || body == size), "length");
        require(memcmp(c->got + body_at, want + first, have < body ? have : (size_t)body) == 0, "wrong byte");
    }
    return have >= body ? body_at + (size_t)body - at : 0;
}

/* Compare the responses with the requests. `all`: every request must have been answered whole. */
static void check_client(const client *c, int all)
{
    size_t at = 0, got = 0;
    int    last = 0;
    while (at < c->sent_n && !last) {
        fcas_http_request r;
        fcas_http_init(&r);
        int result = fcas_http_parse(&r, c->sent + at, c->sent_n - at);
        if (result == FCAS_HTTP_MORE)
            break;
        if (got == c->got_n) {
            require(!all, "a request was not answered");
            return;
        }
        int    status, closes = 0;
        size_t n = check_response(c, got, c->sent + at, &r, &status, &closes);
        require(!status || result == FCAS_HTTP_DONE || (status == result && closes), "not the parser's status");
        require(!status || result != FCAS_HTTP_DONE || r.keep_alive || closes, "Connection: close is not honoured");
        require(n || !all, "a response is not whole");
        if (!n)
            return;
        last = closes;
        got += n;
        at += r.length;
    }
    require(got == c->got_n, "more responses than requests");
    require(!all || !last || c->eof, "the connection is not closed");
}

static void hang_up(client *c)
{
    if (c->fd < 0)
        return;
    check_client(c, 0);
    close(c->fd);
    c->fd = -1;
}

/* ---- one input ---- */

static void answer_one(fcas_engine *e, uint8_t manner)
{
    static const uint8_t FIELDS[] = "Content-Type: text/plain\r\n";
    static uint8_t       body[40000];
    uint8_t              key[32];
    fcas_parked         *p = fcas_engine_take_parked(e);
    if (!p)
        return;
    chunk_key(manner >> 2 & 3, key);
    if ((manner & 1) == 0 ||
        fcas_engine_respond_chunk(e, p->handle, key, FIELDS, sizeof FIELDS - 1, manner >> 4 & 1) == FCAS_E_CORRUPT)
        fcas_engine_respond(e, p->handle, manner & 2 ? 204 : 200, FIELDS, sizeof FIELDS - 1, body,
                            manner & 2 ? 0 : (size_t)manner * 150);
    require(fcas_engine_respond(e, p->handle, 204, NULL, 0, NULL, 0) == FCAS_E_NOTFOUND ||
                manner & 1, "a handle was answered twice");
    free(p);
}

/* Run until nothing moves. */
static void settle(fcas_engine *e, int64_t now)
{
    fcas_event event;
    size_t     before, after = 0;
    do {
        before = after;
        fcas_engine_run(e, 64, now);
        for (fcas_parked *p; (p = fcas_engine_take_parked(e)); free(p))
            fcas_engine_respond(e, p->handle, 204, NULL, 0, NULL, 0);
        while (fcas_engine_take_event(e, &event))
            ;
        after = 1;
        for (uint32_t i = 0; i < N_CLIENTS; i++) {
            read_some(&clients[i], GOT_MAX);
            after += clients[i].got_n + (size_t)clients[i].eof;
        }
    } while (after != before);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    if (!folder[0]) {
        set_up();
        atexit(tear_down);
        for (uint32_t i = 0; i < N_CLIENTS; i++)
            require((clients[i].got = malloc(GOT_MAX)) != NULL, "memory");
    }
    socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address.sun_path + 1));
    int       listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), calm;
    require(listener >= 0 && bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 8) == 0,
            "listen");
    fcas_counter_slot *counters = calloc(1, sizeof *counters);
    int64_t            now = 1000000000;
    fcas_engine_config config = {.listener = listener, .send_path = (data[0] & 15) % 3, .copy_max = 8192,
                                 .max_connections = 1000, .max_cached = 2, .max_parked = 2, .header_ns = 10000000000,
                                 .idle_ns = 60000000000, .stall_ns = 30000000000, .rate_window_ns = 60000000000,
                                 .min_rate = 1024, .accept_pause_ns = 100000000, .counters = counters};
    fcas_engine *e = NULL;
    fcas_bucket  bucket = {0};
    small_buffer = data[0] >> 7;
    config.slots = data[0] >> 4 & 3;
    if (data[0] & 0x40) {
        int fd = memfd_create("bucket", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        require(fcas_bucket_create(fd, 1000000) == FCAS_OK && fcas_bucket_map(&bucket, fd) == FCAS_OK, "bucket");
        close(fd);
        config.bucket = &bucket;
    }
    calm = !config.slots && !config.bucket; /* else some wait for the clock */
    memset(fault, 0, sizeof fault);
    require(counters && fcas_engine_create(&e, &config, now) == FCAS_OK, "create");
    new_table(e);
    for (uint32_t i = 0; i < N_CLIENTS; i++)
        clients[i].fd = -1;
    client *c = &clients[0];
    call(c);
    for (size_t at = 1; at < size;) {
        size_t run = 0;
        while (at + run < size && data[at + run] != 0xff)
            run++;
        write_some(c, data + at, run);
        at += run + 1;
        if (at >= size)
            break;
        uint8_t op = data[at++], n = at < size ? data[at] : 0, key[32];
        if (strchr("rRtacfd", op) && op)
            at++;
        switch (op) {
        case 'r': fcas_engine_run(e, n, now); break;
        case 'R': read_some(c, 64 * (n + 1u)); break;
        case 't':
            calm = 0;
            now += n * 250000000ll;
            fcas_engine_tick(e, now);
            break;
        case 'a': answer_one(e, n); break;
        case 'h':
            calm = 0;
            if (c->fd >= 0)
                shutdown(c->fd, SHUT_WR);
            break;
        case 'x': hang_up(c); break;
        case 'c': c = &clients[n % N_CLIENTS]; break;
        case 'f':
            calm = 0;
            fault[n % N_CALLS] = (uint8_t)((n >> 2) % N_FAULTS);
            break;
        case 'd':
            chunk_key(n / 2 % N_CHUNKS, key);
            calm = 0; /* /files without one of its chunks ends short */
            if (n & 1)
                new_table(e);
            else if (fcas_table_remove(&writer, FCAS_ENTRY_CHUNK, key) == FCAS_OK)
                fcas_table_advance(&writer);
            break;
        case 'D':
            calm = 0;
            fcas_engine_drain(e);
            break;
        case 0xff: write_some(c, &op, 1); break;
        default: break;
        }
        if (c->fd < 0)
            call(c);
    }
    memset(fault, 0, sizeof fault);
    settle(e, now);
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        if (clients[i].fd >= 0 && calm && clients[i].got_n < GOT_MAX)
            check_client(&clients[i], 1);
        hang_up(&clients[i]);
    }
    for (int i = 0; i < 3; i++) { /* what lingers, waits for a deadline, or was not even accepted */
        settle(e, now);
        now += 61000000000;
        fcas_engine_tick(e, now);
    }
    fcas_engine_stats stats;
    fcas_engine_statistics(e, &stats);
    require(!stats.connections && !stats.sending && !stats.parked && !stats.inputs && !stats.in_flight,
            "something is held in the end");
    fcas_engine_destroy(e);
    fcas_bucket_unmap(&bucket);
    close(listener);
    free(counters);
    return 0;
}
