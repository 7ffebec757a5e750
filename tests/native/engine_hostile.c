/* The serve engine under hostile clients, with the sanitizers, in one thread: the engine's clock is ours.
 *
 *   engine_hostile SEED STEPS FOLDER
 *
 * Clients send requests whole, in pieces and pipelined, garbage, half-close, reset, stop reading; the owner answers
 * parked requests late, swaps tables, removes chunks and advances the epoch, shortens and removes blobs,
 * lets deadlines pass. Checked: every byte of a 200 or 206 is the chunk's own (what cannot be served ends the
 * connection, never carries something else), nothing leaks, memory and counts are back at zero in the end. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/engine.h"

#define N_BLOBS    6u
#define BLOB_SIZE  (3u << 20)
#define CHUNK_SIZE (64u << 10)
#define N_CHUNKS   (BLOB_SIZE / CHUNK_SIZE) /* per blob */
#define N_CLIENTS  24
#define FILE_BLOB  N_BLOBS /* holds the manifest */
#define PENDING    64

static uint64_t rng_state;

static uint32_t rnd(uint32_t below)
{
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return (uint32_t)(rng_state >> 24) % below;
}

static void die(const char *what)
{
    fprintf(stderr, "engine_hostile: %s (errno %d)\n", what, errno);
    exit(3);
}

static uint8_t byte_at(uint32_t blob, uint64_t at)
{
    uint64_t x = (at >> 3) * 0x9e3779b97f4a7c15ull ^ (blob + 1) * 0xd6e8feb86659fd93ull;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9ull;
    return (uint8_t)(x >> (8 * (at & 7)));
}

/* ---- blobs and table ---- */

typedef struct {
    char path[300];
    int  growing; /* listed as a part file from the next table on */
} blob_file;

static blob_file   blobs[N_BLOBS + 1];
static const char *folder;
static fcas_table  writer;
static int         table_fd = -1;
static uint64_t    table_number;
static int         damaged; /* a blob is not what the table says */

static void write_blob(uint32_t b, uint64_t from, uint64_t to)
{
    static uint8_t bytes[BLOB_SIZE];
    int            fd = open(blobs[b].path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    for (uint64_t i = from; i < to; i++)
        bytes[i - from] = byte_at(b, i);
    if (fd < 0 || pwrite(fd, bytes, to - from, (off_t)from) != (ssize_t)(to - from) || ftruncate(fd, (off_t)to) != 0)
        die("write blob");
    close(fd);
}

static void chunk_key(uint32_t blob, uint32_t i, uint8_t key[32])
{
    memset(key, 0xc0, 32);
    key[0] = (uint8_t)blob;
    key[1] = (uint8_t)i;
}

static void list_blob(uint32_t b, uint64_t size)
{
    struct stat st;
    if (stat(blobs[b].path, &st) != 0)
        die("stat blob");
    fcas_blob entry = {.device = (uint64_t)st.st_dev, .inode = (uint64_t)st.st_ino, .size = size,
                       .mtime_ns = (int64_t)st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec,
                       .flags = blobs[b].growing ? FCAS_BLOB_GROWING : b == 1 ? FCAS_BLOB_LINKED : 0};
    if (fcas_table_put_blob(&writer, b, &entry, blobs[b].path, strlen(blobs[b].path)) != FCAS_OK)
        die("put blob");
}

static void list_chunk(uint32_t b, uint32_t i)
{
    uint8_t key[32];
    chunk_key(b, i, key);
    fcas_place place = {.offset = (uint64_t)i * CHUNK_SIZE, .length = CHUNK_SIZE, .blob = b};
    if (fcas_table_put(&writer, FCAS_ENTRY_CHUNK, key, place) != FCAS_OK)
        die("put chunk");
}

static void write_manifest(void)
{
    static uint8_t bytes[64 + 32 * N_CHUNKS];
    uint8_t        file_hash[32], manifest_hash[32];
    uint32_t       n = N_CHUNKS, chunk = CHUNK_SIZE;
    uint64_t       size = BLOB_SIZE;
    struct stat    st;
    memset(file_hash, 0xf1, 32);
    memset(manifest_hash, 0xa1, 32);
    memcpy(bytes, "FCASMAN1\1", 9);
    memcpy(bytes + 12, &chunk, 4);
    memcpy(bytes + 16, &size, 8);
    memcpy(bytes + 24, &n, 4);
    memcpy(bytes + 32, file_hash, 32);
    for (uint32_t i = 0; i < n; i++)
        chunk_key(0, i, bytes + 64 + 32 * i);
    int fd = open(blobs[FILE_BLOB].path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, bytes, sizeof bytes) != (ssize_t)sizeof bytes || fstat(fd, &st) != 0)
        die("write manifest");
    close(fd);
    list_blob(FILE_BLOB, sizeof bytes);
    fcas_place place = {.offset = 0, .length = sizeof bytes, .blob = FILE_BLOB};
    if (fcas_table_put(&writer, FCAS_ENTRY_MANIFEST, manifest_hash, place) != FCAS_OK ||
        fcas_table_put_file(&writer, file_hash, manifest_hash) != FCAS_OK)
        die("put file");
}

/* A new table with everything in it, blobs whole. */
static void new_table(fcas_engine *e)
{
    static const uint8_t secret[16] = {1};
    uint64_t             epoch = writer.base ? fcas_table_epoch(&writer) : 0;
    fcas_table_unmap(&writer);
    if (table_fd >= 0)
        close(table_fd);
    table_fd = memfd_create("table", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (table_fd < 0 || fcas_table_create(&writer, table_fd, 4096, 64, 65536, secret) != FCAS_OK)
        die("table");
    for (uint32_t b = 0; b < N_BLOBS; b++) {
        write_blob(b, 0, BLOB_SIZE);
        list_blob(b, BLOB_SIZE);
        for (uint32_t i = 0; i < N_CHUNKS; i++)
            list_chunk(b, i);
    }
    write_manifest();
    for (uint64_t i = 0; i < epoch; i += epoch / 2 + 1)
        fcas_table_advance(&writer);
    damaged = 0;
    if (fcas_engine_set_table(e, table_fd, ++table_number) != FCAS_OK)
        die("set_table");
}

/* ---- clients ---- */

typedef struct {
    uint32_t blob;
    uint64_t at, length; /* what a 200 carries */
    uint8_t  kind;       /* 0 content, 1 anything, 2 HEAD */
} expected;

typedef struct {
    int      fd;
    int      wild;    /* sent garbage: answers mean nothing */
    int      stopped; /* does not read */
    int      half;    /* sent its end */
    expected pending[PENDING];
    unsigned first, n;
    char     out[65536];
    size_t   out_at, out_n;
    char     head[4096];
    size_t   head_n;
    uint64_t body_left, body_at;
    int      checks;
    uint32_t body_blob;
} client;

static client             clients[N_CLIENTS];
static struct sockaddr_in address;
static uint64_t           n_checked, n_answers;

static void hang_up(client *c, int reset)
{
    if (c->fd < 0)
        return;
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    if (reset)
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(c->fd);
    memset(c, 0, sizeof *c);
    c->fd = -1;
}

static void call(client *c)
{
    memset(c, 0, sizeof *c);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int small = 4096;
    if (rnd(2))
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (c->fd < 0 || (connect(c->fd, (struct sockaddr *)&address, sizeof address) != 0 && errno != EINPROGRESS))
        die("connect");
}

static void hex_of(const uint8_t *hash, char *out)
{
    for (int i = 0; i < 32; i++)
        sprintf(out + 2 * i, "%02x", hash[i]);
}

static void ask(client *c)
{
    char     hex[65], line[512];
    uint8_t  key[32];
    expected want = {.kind = 1};
    if (c->n == PENDING || c->half || c->out_n > sizeof c->out - 9000)
        return;
    uint32_t blob = rnd(N_BLOBS), i = rnd(N_CHUNKS);
    int      n;
    switch (rnd(20)) {
    case 0:
        n = snprintf(line, sizeof line, "GET /health HTTP/1.%u\r\nHost: x\r\n%s\r\n", rnd(2),
                     rnd(4) ? "" : "Connection: close\r\n");
        break;
    case 1:
    case 2:
        memset(key, 0xf1, 32);
        hex_of(key, hex);
        if (rnd(8)) {
            uint64_t from = rnd(BLOB_SIZE), to = from + rnd(300000);
            n = snprintf(line, sizeof line, "GET /files/%s?name=%%41%%e2x HTTP/1.1\r\nHost: x\r\nRange: bytes=%llu-%llu\r\n\r\n",
                         hex, (unsigned long long)from, (unsigned long long)to);
            to = to < BLOB_SIZE ? to : BLOB_SIZE - 1;
            want = (expected){.blob = 0, .at = from, .length = to - from + 1, .kind = 0};
        } else {
            n = snprintf(line, sizeof line, "GET /files/%s HTTP/1.1\r\nHost: x\r\n\r\n", hex);
            want = (expected){.blob = 0, .at = 0, .length = BLOB_SIZE, .kind = 0};
        }
        break;
    case 3:
        memset(key, 0xf1, 32);
        hex_of(key, hex);
        n = snprintf(line, sizeof line, "%s /swarm/%s%s?wait_ms=%u HTTP/1.1\r\nHost: x\r\nFastcas-Peer: ab\r\n\r\n",
                     rnd(8) ? "GET" : "HEAD", hex, rnd(2) ? "/next" : "", rnd(5000));
        if (line[0] == 'H')
            want.kind = 2;
        break;
    case 4:
        memset(key, 0xa1, 32);
        hex_of(key, hex);
        n = snprintf(line, sizeof line, "GET /manifests/%s HTTP/1.1\r\nHost: x\r\n\r\n", hex);
        break;
    case 5: { /* garbage */
        n = 1 + (int)rnd(200);
        for (int k = 0; k < n; k++)
            line[k] = (char)rnd(256);
        c->wild = 1;
        break;
    }
    case 6: { /* heads at the limits: lines that end anywhere around 8,192 and 1,024 bytes */
        size_t to = rnd(4) ? 8150 + rnd(60) : 1000 + rnd(40);
        char  *at = c->out + c->out_n;
        size_t k = (size_t)sprintf(at, "GET /health HTTP/1.1\r\nHost: x\r\n");
        while (k < to) {
            size_t part = to - k > 300 ? 280 : to - k;
            if (part < 6)
                part = 6;
            memcpy(at + k, "X: ", 3);
            memset(at + k + 3, 'y', part - 5);
            memcpy(at + k + part - 2, "\r\n", 2);
            k += part;
        }
        c->out_n += k;
        if (rnd(2)) {
            memcpy(c->out + c->out_n, "\r\n", 2);
            c->out_n += 2;
        }
        c->wild = 1;
        return;
    }
    default:
        chunk_key(blob, i, key);
        hex_of(key, hex);
        n = snprintf(line, sizeof line, "%s /chunks/%s HTTP/1.1\r\nHost: x\r\n%s%s\r\n", rnd(10) ? "GET" : "HEAD", hex,
                     rnd(10) ? "" : "If-None-Match: \"zz\", *\r\n", rnd(3) ? "" : "Fastcas-Peer: cd\r\n");
        want = (expected){.blob = blob, .at = (uint64_t)i * CHUNK_SIZE, .length = CHUNK_SIZE, .kind = line[0] == 'H' ? 2 : 0};
    }
    memcpy(c->out + c->out_n, line, (size_t)n);
    c->out_n += (size_t)n;
    c->pending[(c->first + c->n++) % PENDING] = want;
}

static void push(client *c)
{
    size_t left = c->out_n - c->out_at;
    if (!left)
        return;
    size_t  part = rnd(3) ? left : 1 + rnd((uint32_t)(left < 40 ? left : 40));
    ssize_t n = send(c->fd, c->out + c->out_at, part, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0)
        c->out_at += (size_t)n;
    else if (n < 0 && errno != EAGAIN && errno != ENOTCONN) {
        hang_up(c, 0);
        return;
    }
    if (c->out_at == c->out_n)
        c->out_at = c->out_n = 0;
}

static void end_of_answer(client *c)
{
    c->head_n = 0;
    c->first = (c->first + 1) % PENDING;
    c->n--;
    n_answers++;
}

static void wrong(client *c, const char *what)
{
    c->head[c->head_n < sizeof c->head ? c->head_n : sizeof c->head - 1] = 0;
    fprintf(stderr, "wrong answer: %s\n%s\n", what, c->head);
    exit(2);
}

static void take(client *c, const uint8_t *p, size_t n)
{
    while (n && !c->wild) {
        if (c->body_left) {
            size_t part = n < c->body_left ? n : (size_t)c->body_left;
            if (c->checks)
                for (size_t i = 0; i < part; i++)
                    if (p[i] != byte_at(c->body_blob, c->body_at + i))
                        wrong(c, "a byte of the body is not the chunk's");
            n_checked += c->checks ? part : 0;
            c->body_at += part;
            c->body_left -= part;
            p += part;
            n -= part;
            if (!c->body_left)
                end_of_answer(c);
            continue;
        }
        if (c->head_n == sizeof c->head - 1)
            wrong(c, "endless head");
        c->head[c->head_n++] = (char)*p++;
        n--;
        if (c->head_n < 4 || memcmp(c->head + c->head_n - 4, "\r\n\r\n", 4) != 0)
            continue;
        c->head[c->head_n] = 0;
        if (!c->n) {
            if (strncmp(c->head, "HTTP/1.1 503 ", 13) == 0) {
                c->wild = 1; /* refused before it asked */
                return;
            }
            wrong(c, "nobody asked");
        }
        const expected *want = &c->pending[c->first];
        int             status = atoi(c->head + 9);
        const char     *length = strstr(c->head, "Content-Length: ");
        if (strncmp(c->head, "HTTP/1.1 ", 9) != 0 || status < 200 || (!length && status != 204 && status != 304))
            wrong(c, "malformed");
        c->body_left = length && want->kind != 2 && status != 304 ? strtoull(length + 16, NULL, 10) : 0;
        c->checks = (status == 200 || status == 206) && want->kind == 0;
        if (c->checks && c->body_left != want->length)
            wrong(c, "length");
        c->body_blob = want->blob;
        c->body_at = want->at;
        if (!c->body_left)
            end_of_answer(c);
    }
}

static void pull(client *c)
{
    static uint8_t bytes[1 << 17];
    for (int i = 0; i < 4; i++) {
        ssize_t n = recv(c->fd, bytes, rnd(4) ? sizeof bytes : 1 + rnd(2000), MSG_DONTWAIT);
        if (n > 0) {
            take(c, bytes, (size_t)n);
        } else if (n == 0 || (errno != EAGAIN && errno != ENOTCONN)) {
            hang_up(c, 0);
            return;
        } else {
            return;
        }
    }
}

/* ---- the owner ---- */

static uint64_t held[256];
static unsigned n_held;

static void answer(fcas_engine *e, uint64_t handle)
{
    static const uint8_t type[] = "Content-Type: text/plain\r\n";
    static uint8_t       body[20000];
    uint8_t              key[32];
    fcas_status          status;
    if (rnd(3)) {
        chunk_key(rnd(N_BLOBS), rnd(N_CHUNKS + 2), key);
        status = fcas_engine_respond_chunk(e, handle, key, type, sizeof type - 1, (int)rnd(2));
        if (status != FCAS_E_CORRUPT)
            return;
    }
    int code = rnd(4) ? 200 : 204;
    fcas_engine_respond(e, handle, code, type, rnd(2) ? sizeof type - 1 : 0, code == 204 ? NULL : body,
                        code == 204 ? 0 : rnd(sizeof body));
}

static void owner(fcas_engine *e)
{
    for (fcas_parked *p; (p = fcas_engine_take_parked(e)); free(p)) {
        if (n_held < 256 && rnd(2))
            held[n_held++] = p->handle;
        else
            answer(e, p->handle);
    }
    while (n_held && rnd(3) == 0)
        answer(e, held[--n_held]);
    fcas_event event;
    while (fcas_engine_take_event(e, &event))
        ;
    uint8_t keys[32 * 3], found[3], out[4096];
    chunk_key(0, 0, keys);
    chunk_key(1, rnd(100), keys + 32);
    memset(keys + 64, 0xa1, 32);
    fcas_engine_have(e, keys, 3, found);
    fcas_engine_read_manifest(e, keys + 64, rnd(2000), out, rnd(2000));
}

static void shake(fcas_engine *e, int copies)
{
    uint32_t b = 1 + rnd(N_BLOBS - 1); /* blob 0 stays whole: /files must work */
    uint8_t  key[32];
    switch (rnd(14)) {
    case 0:
        new_table(e);
        break;
    case 1:
        chunk_key(b, rnd(N_CHUNKS), key);
        fcas_table_remove(&writer, FCAS_ENTRY_CHUNK, key);
        fcas_table_advance(&writer);
        break;
    case 2:
        if (copies) { /* with sendfile, bytes in a socket's queue are the file's own pages */
            off_t       to = (off_t)rnd(BLOB_SIZE >> 12) << 12;
            struct stat facts;
            /* Shorter only: truncate() to more than the size puts zeros where the chunks were. */
            if (stat(blobs[b].path, &facts) == 0 && to < facts.st_size && truncate(blobs[b].path, to) != 0)
                die("truncate");
            damaged = 1;
        }
        break;
    case 3:
        if (rnd(2))
            unlink(blobs[b].path);
        if (fcas_table_remove_blob(&writer, b) == FCAS_OK)
            fcas_table_advance(&writer);
        damaged = 1;
        break;
    case 4:
        blobs[b].growing = (int)rnd(2);
        break;
    default:
        if (damaged && rnd(4) == 0)
            new_table(e);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 64;
    rng_state = strtoull(argv[1], NULL, 10) * 0x9e3779b97f4a7c15ull | 1;
    long steps = strtol(argv[2], NULL, 10);
    folder = argv[3];
    signal(SIGPIPE, SIG_IGN);
    for (uint32_t b = 0; b <= N_BLOBS; b++)
        snprintf(blobs[b].path, sizeof blobs[b].path, "%s/blob-%u", folder, b);

    int       listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t length = sizeof address;
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) != 0)
        die("listen");
    fcas_counter_slot *counters = calloc(1, sizeof *counters + 64);
    if (!counters)
        die("counters");
    int                copies = (int)rnd(2);
    int64_t            now = 1000000000;
    fcas_engine_config config = {.listener = listener, .send_path = copies ? FCAS_SEND_COPY : FCAS_SEND_AUTO,
                                 .copy_max = 8192, .max_connections = N_CLIENTS - 4, .max_cached = 3, .max_parked = 6,
                                 .header_ns = 10000000000, .idle_ns = 60000000000, .stall_ns = 30000000000,
                                 .rate_window_ns = 60000000000, .min_rate = 1024, .accept_pause_ns = 100000000,
                                 .slots = rnd(3), .max_per_source = 3, .counters = counters};
    fcas_bucket bucket = {0};
    int         bucket_fd = memfd_create("bucket", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (bucket_fd < 0 || fcas_bucket_create(bucket_fd, 20000000) != FCAS_OK ||
        fcas_bucket_map(&bucket, bucket_fd) != FCAS_OK)
        die("bucket");
    if (rnd(2))
        config.bucket = &bucket;
    fcas_engine *e;
    if (fcas_engine_create(&e, &config, now) != FCAS_OK)
        die("create");
    new_table(e);
    for (int i = 0; i < N_CLIENTS; i++)
        clients[i].fd = -1;

    for (long step = 0; step < steps; step++) {
        for (int k = 0; k < 6; k++) {
            client *c = &clients[rnd(N_CLIENTS)];
            if (c->fd < 0) {
                call(c);
                continue;
            }
            switch (rnd(30)) {
            case 0:
                hang_up(c, (int)rnd(2));
                continue;
            case 1:
                if (c->out_at == c->out_n && shutdown(c->fd, SHUT_WR) == 0)
                    c->half = 1;
                break;
            case 2:
                c->stopped = !c->stopped;
                break;
            default:
                for (uint32_t i = rnd(6); i > 0; i--)
                    ask(c);
                push(c);
            }
            if (c->fd >= 0 && !c->stopped)
                pull(c);
        }
        now += rnd(2000000);
        if (rnd(300) == 0)
            now += (int64_t)rnd(40) * 1000000000;
        fcas_engine_run(e, 1 + rnd(64), now);
        owner(e);
        if (rnd(20) == 0)
            fcas_engine_tick(e, now);
        if (rnd(10) == 0)
            shake(e, copies);
    }
    fcas_engine_stats stats;
    fcas_engine_drain(e);
    for (int i = 0; i < N_CLIENTS; i++)
        hang_up(&clients[i], 0);
    for (int i = 0; i < 200; i++) {
        now += 1000000000;
        fcas_engine_run(e, 512, now);
        owner(e);
        while (n_held)
            answer(e, held[--n_held]);
        fcas_engine_tick(e, now);
    }
    fcas_engine_statistics(e, &stats);
    printf("checked %llu B in %llu answers; left: %u connections, %u sending, %u parked, %u inputs, %u in flight\n",
           (unsigned long long)n_checked, (unsigned long long)n_answers, stats.connections, stats.sending, stats.parked,
           stats.inputs, stats.in_flight);
    int clean = !stats.connections && !stats.sending && !stats.parked && !stats.inputs && !stats.in_flight &&
                stats.cached <= config.max_cached;
    fcas_engine_destroy(e);
    fcas_bucket_unmap(&bucket);
    close(bucket_fd);
    fcas_table_unmap(&writer);
    close(table_fd);
    close(listener);
    free(counters);
    return clean && n_checked > 0 ? 0 : 1;
}
