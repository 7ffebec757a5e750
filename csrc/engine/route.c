/* From a parsed request to the beginning of its response: targets, conditions, ranges, header lines. */
#include <stdlib.h>
#include <string.h>

#include "common/hex.h"
#include "engine/internal.h"

#define HEX_LEN    64u
#define NAME_MAX_B 255u

/* ---- header text ---- */

typedef struct {
    uint8_t *at;
} out;

static void put(out *o, const void *bytes, size_t n)
{
    if (n) /* nothing may be at NULL, which memcpy must not see */
        memcpy(o->at, bytes, n);
    o->at += n;
}
#define PUT(o, literal) put((o), "" literal, sizeof(literal) - 1)

static void put_number(out *o, uint64_t v)
{
    char   digits[20];
    size_t n = 0;
    do {
        digits[sizeof digits - ++n] = (char)('0' + v % 10);
        v /= 10;
    } while (v);
    put(o, digits + sizeof digits - n, n);
}

static const char *reason_of(int status)
{
    switch (status) {
    case 200: return "200 OK";
    case 204: return "204 No Content";
    case 206: return "206 Partial Content";
    case 304: return "304 Not Modified";
    case 400: return "400 Bad Request";
    case 404: return "404 Not Found";
    case 405: return "405 Method Not Allowed";
    case 414: return "414 URI Too Long";
    case 416: return "416 Range Not Satisfiable";
    case 417: return "417 Expectation Failed";
    case 429: return "429 Too Many Requests";
    case 431: return "431 Request Header Fields Too Large";
    case 503: return "503 Service Unavailable";
    case 505: return "505 HTTP Version Not Supported";
    default:  return "500 Internal Server Error";
    }
}

static const char *explanation_of(int status)
{
    switch (status) {
    case 400: return "malformed request: fastcas speaks strict HTTP/1.1 without request bodies\n";
    case 404: return "not here\n";
    case 405: return "only GET and HEAD are served\n";
    case 414: return "request line is longer than 1024 bytes\n";
    case 416: return "the range lies outside the content\n";
    case 417: return "expectations are not supported\n";
    case 431: return "more than 8192 bytes or 64 fields of header\n";
    case 503: return "busy\n";
    case 505: return "only HTTP/1.0 and HTTP/1.1 are served\n";
    default:  return "internal error\n";
    }
}

static void put_status(out *o, const fcas_engine *e, int status)
{
    const char *text = reason_of(status);
    PUT(o, "HTTP/1.1 ");
    put(o, text, strlen(text));
    PUT(o, "\r\n");
    put(o, e->date, e->date_len);
}

static void put_connection(out *o, const fcas_conn *c)
{
    if (c->close_after)
        PUT(o, "Connection: close\r\n");
    else if (c->req.minor == 0)
        PUT(o, "Connection: keep-alive\r\n");
}

/* Take what was written to the engine's scratch as c's response. */
static void send_scratch(fcas_engine *e, fcas_conn *c, const out *o)
{
    c->mem = e->scratch;
    c->mem_borrowed = 1;
    c->mem_at = 0;
    c->mem_len = (uint32_t)(o->at - e->scratch);
}

void fcas_route_error(fcas_engine *e, fcas_conn *c, int status, int last)
{
    const char *text = explanation_of(status);
    size_t      n = strlen(text);
    out         o = {e->scratch};
    c->close_after |= (uint8_t)last;
    put_status(&o, e, status);
    PUT(&o, "Content-Type: text/plain\r\nContent-Length: ");
    put_number(&o, n);
    PUT(&o, "\r\n");
    if (status == 405)
        PUT(&o, "Allow: GET, HEAD\r\n");
    if (status == 503)
        PUT(&o, "Retry-After: 0\r\n");
    put_connection(&o, c);
    PUT(&o, "\r\n");
    if (!c->is_head)
        put(&o, text, n);
    send_scratch(e, c, &o);
    fcas_conn_begin(e, c, status);
}

/* ---- the content routes ---- */

int fcas_route_extent(fcas_engine *e, fcas_conn *c, fcas_place place, uint64_t skip, uint64_t length)
{
    int          busy;
    fcas_cached *b = fcas_cache_get(e, place, &busy);
    if (!b)
        return busy ? 503 : 404;
    c->blob = b;
    c->body_at = place.offset + skip;
    c->body_left = length;
    fcas_epoch_enter(e, c);
    return 0;
}

static int sends_with_sendfile(const fcas_engine *e, uint64_t length)
{
    if (e->config.send_path == FCAS_SEND_AUTO)
        return length > e->config.copy_max;
    return e->config.send_path == FCAS_SEND_SENDFILE;
}

/* The name of a download: percent-decoded, what could mislead replaced, in both forms of RFC 6266. */
static void put_disposition(out *o, const uint8_t *query, size_t query_len)
{
    static const char HEX_DIGITS[] = "0123456789ABCDEF";
    const uint8_t    *value = NULL;
    size_t            value_len = 0;
    uint8_t           name[NAME_MAX_B * 3];
    if (fcas_http_query(query, query_len, "name", &value, &value_len) != 1 || value_len > sizeof name)
        return;
    long n = fcas_http_unquote(value, value_len, name);
    if (n <= 0 || n > (long)NAME_MAX_B)
        return;
    int ascii = 1;
    for (long i = 0; i < n; i++) {
        if (name[i] < 0x20 || name[i] == 0x7f || strchr("/\\\"", name[i]))
            name[i] = '_';
        ascii &= name[i] < 0x80;
    }
    PUT(o, "Content-Disposition: attachment; filename=\"");
    for (long i = 0; i < n; i++) {
        uint8_t shown = name[i] >= 0x80 || name[i] == '%' ? '_' : name[i];
        put(o, &shown, 1);
    }
    PUT(o, "\"");
    if (!ascii || memchr(name, '%', (size_t)n)) {
        PUT(o, "; filename*=UTF-8''");
        for (long i = 0; i < n; i++) {
            uint8_t b = name[i];
            if ((b >= '0' && b <= '9') || (b >= 'a' && b <= 'z') || (b >= 'A' && b <= 'Z') || strchr("-._~", b)) {
                put(o, &b, 1);
            } else {
                uint8_t escaped[3] = {'%', (uint8_t)HEX_DIGITS[b >> 4], (uint8_t)HEX_DIGITS[b & 15]};
                put(o, escaped, 3);
            }
        }
    }
    PUT(o, "\r\n");
}

typedef struct {
    const uint8_t *hex;   /* of the content's hash */
    uint64_t       size;
    const fcas_run *shape; /* a file */
    fcas_place     place; /* anything else */
    const uint8_t *query; /* a file's */
    size_t         query_len;
    const uint8_t *fields; /* further header lines */
    size_t         fields_len;
    int            conditional; /* honour the request's conditions and range */
} content;

static int range_of(const fcas_conn *c, const uint8_t *buf, const content *what, uint64_t *first, uint64_t *last)
{
    const fcas_http_request *r = &c->req;
    if (!what->conditional || r->range.len == 0 || r->method != FCAS_HTTP_GET)
        return 200;
    if (r->if_range.len) {
        const uint8_t *tag = buf + r->if_range.at;
        if (r->if_range.len != HEX_LEN + 2 || tag[0] != '"' || tag[HEX_LEN + 1] != '"' ||
            memcmp(tag + 1, what->hex, HEX_LEN) != 0)
            return 200;
    }
    return fcas_http_range(buf + r->range.at, r->range.len, what->size, first, last);
}

/* The answer with some content, or with the reason why not. Returns 0, or the status of an error not yet written. */
static int answer(fcas_engine *e, fcas_conn *c, const uint8_t *buf, const content *what)
{
    uint64_t first = 0, last = what->size ? what->size - 1 : 0, length = what->size;
    int      status = 200;
    if (what->conditional && c->req.if_none_match.len &&
        fcas_http_etag_matches(buf + c->req.if_none_match.at, c->req.if_none_match.len, what->hex, HEX_LEN))
        status = 304;
    else
        status = range_of(c, buf, what, &first, &last);
    if (status == 206)
        length = last - first + 1;

    if (!c->is_head && (status == 200 || status == 206) && length) {
        int failed = what->shape ? fcas_run_start(e, c, what->shape, first, last)
                                 : fcas_route_extent(e, c, what->place, first, length);
        if (failed)
            return failed;
    } else if (c->is_head && !what->shape) {
        /* a HEAD promises what a GET would send */
        int busy;
        fcas_cached *b = fcas_cache_get(e, what->place, &busy);
        if (!b)
            return busy ? 503 : 404;
        fcas_cache_put(e, b);
    }
    out o = {e->scratch};
    put_status(&o, e, status);
    if (status == 416) {
        PUT(&o, "Content-Range: bytes */");
        put_number(&o, what->size);
        PUT(&o, "\r\nContent-Type: text/plain\r\nContent-Length: ");
        put_number(&o, strlen(explanation_of(416)));
        PUT(&o, "\r\n");
    } else {
        if (status != 304) {
            PUT(&o, "Content-Type: application/octet-stream\r\nContent-Length: ");
            put_number(&o, length);
            PUT(&o, "\r\n");
        }
        if (status == 206) {
            PUT(&o, "Content-Range: bytes ");
            put_number(&o, first);
            PUT(&o, "-");
            put_number(&o, last);
            PUT(&o, "/");
            put_number(&o, what->size);
            PUT(&o, "\r\n");
        }
        PUT(&o, "ETag: \"");
        put(&o, what->hex, HEX_LEN);
        if (what->conditional)
            PUT(&o, "\"\r\nCache-Control: public, max-age=31536000, immutable\r\nAccept-Ranges: bytes\r\n");
        else
            PUT(&o, "\"\r\nCache-Control: no-store\r\n");
        if (what->query_len)
            put_disposition(&o, what->query, what->query_len);
        put(&o, what->fields, what->fields_len);
    }
    put_connection(&o, c);
    PUT(&o, "\r\n");
    if (status == 416)
        put(&o, explanation_of(416), strlen(explanation_of(416)));
    send_scratch(e, c, &o);
    if (c->blob)
        c->use_sendfile = (uint8_t)sends_with_sendfile(e, length);
    fcas_conn_begin(e, c, status);
    return 0;
}

static int route_blob(fcas_engine *e, fcas_conn *c, const uint8_t *buf, const uint8_t *hex, fcas_entry_type type)
{
    uint8_t hash[32];
    content what = {.hex = hex, .conditional = 1};
    if (!fcas_hex_decode_hash(hex, hash) || !e->has_table ||
        fcas_table_lookup(&e->table, type, hash, &what.place) != FCAS_OK)
        return 404;
    what.size = what.place.length;
    if (type == FCAS_ENTRY_CHUNK && c->req.peer.len && !c->is_head) {
        int refused = fcas_slot_admit(e, c, what.place.length, 1);
        if (refused)
            return refused;
    }
    return answer(e, c, buf, &what);
}

static int route_file(fcas_engine *e, fcas_conn *c, const uint8_t *buf, const uint8_t *hex)
{
    uint8_t  hash[32];
    fcas_run shape;
    if (!fcas_hex_decode_hash(hex, hash))
        return 404;
    int status = fcas_run_open(e, hash, &shape);
    if (status)
        return status;
    content what = {.hex = hex, .size = shape.size, .shape = &shape, .conditional = 1,
                    .query = buf + c->req.query.at, .query_len = c->req.query.len};
    status = answer(e, c, buf, &what);
    if (!c->run)
        fcas_cache_put(e, shape.manifest);
    return status;
}

static int route_health(fcas_engine *e, fcas_conn *c)
{
    out o = {e->scratch};
    put_status(&o, e, 200);
    PUT(&o, "Content-Type: text/plain\r\nContent-Length: 3\r\nCache-Control: no-store\r\n");
    put_connection(&o, c);
    PUT(&o, "\r\n");
    if (!c->is_head)
        PUT(&o, "ok\n");
    send_scratch(e, c, &o);
    fcas_conn_begin(e, c, 200);
    return 0;
}

/* ---- what the owner answers ---- */

static int park(fcas_engine *e, fcas_conn *c, const uint8_t *buf, int is_next)
{
    const fcas_http_request *r = &c->req;
    if (is_next && r->peer.len && !c->is_head && fcas_slot_admit(e, c, e->next_bytes, 0) == FCAS_SLOT_QUEUED)
        return FCAS_SLOT_QUEUED;
    if (e->n_parked >= e->config.max_parked)
        return 503;
    fcas_parked *p = malloc(sizeof *p + r->path.len + r->query.len + r->peer.len);
    if (!p)
        return 503;
    p->next = NULL;
    p->handle = (uint64_t)++c->park_serial << 32 | c->index;
    p->is_head = c->is_head;
    memcpy(p->ip, c->ip, sizeof p->ip);
    p->port = c->port;
    p->path_len = r->path.len;
    p->query_len = r->query.len;
    p->peer_len = r->peer.len;
    memcpy(p->bytes, buf + r->path.at, r->path.len);
    memcpy(p->bytes + r->path.len, buf + r->query.at, r->query.len);
    memcpy(p->bytes + r->path.len + r->query.len, buf + r->peer.at, r->peer.len);
    if (e->parked_tail)
        e->parked_tail->next = p;
    else
        e->parked_head = p;
    e->parked_tail = p;
    e->n_parked++;
    c->state = CONN_PARKED;
    fcas_timer_set(e, c, TIMER_NONE);
    return 0;
}

static int begins(const uint8_t *path, size_t n, const char *prefix, size_t prefix_len)
{
    return n >= prefix_len && memcmp(path, prefix, prefix_len) == 0;
}

void fcas_route(fcas_engine *e, fcas_conn *c, const uint8_t *buf)
{
    const uint8_t *path = buf + c->req.path.at;
    size_t         n = c->req.path.len;
    int            no_query = c->req.query.len == 0, status = 404;
    c->is_head = c->req.method == FCAS_HTTP_HEAD;
    c->close_after = !c->req.keep_alive || e->draining;
    if (begins(path, n, "/chunks/", 8)) {
        if (n == 8 + HEX_LEN && no_query)
            status = route_blob(e, c, buf, path + 8, FCAS_ENTRY_CHUNK);
    } else if (begins(path, n, "/manifests/", 11)) {
        if (n == 11 + HEX_LEN && no_query)
            status = route_blob(e, c, buf, path + 11, FCAS_ENTRY_MANIFEST);
    } else if (begins(path, n, "/files/", 7)) {
        if (n == 7 + HEX_LEN)
            status = route_file(e, c, buf, path + 7);
    } else if (begins(path, n, "/swarm/", 7)) {
        uint8_t hash[32];
        if ((n == 7 + HEX_LEN || (n == 12 + HEX_LEN && memcmp(path + 7 + HEX_LEN, "/next", 5) == 0)) &&
            fcas_hex_decode_hash(path + 7, hash))
            status = park(e, c, buf, n != 7 + HEX_LEN);
    } else if (n == 7 && no_query && memcmp(path, "/health", 7) == 0) {
        status = route_health(e, c);
    }
    if (status && status != FCAS_SLOT_QUEUED)
        fcas_route_error(e, c, status, 0);
}

/* The connection of a handle that waits for its answer, or NULL. */
static fcas_conn *parked_conn(fcas_engine *e, uint64_t handle)
{
    fcas_conn *c = fcas_conn_at(e, (uint32_t)handle);
    return c && c->state == CONN_PARKED && c->park_serial == handle >> 32 ? c : NULL;
}

/* A parked connection goes on with its response. */
static void unpark(fcas_engine *e, fcas_conn *c)
{
    e->n_parked--;
    fcas_conn_run(e, c);
    fcas_engine_kick(e);
}

fcas_status fcas_engine_respond(fcas_engine *e, uint64_t handle, int status, const uint8_t *fields, size_t fields_len,
                                const uint8_t *body, size_t body_len)
{
    fcas_conn *c = parked_conn(e, handle);
    if (!c)
        return FCAS_E_NOTFOUND;
    if (fields_len > FCAS_SCRATCH_SIZE / 2 || body_len > UINT32_MAX / 2)
        return FCAS_E_ARG;
    c->close_after |= (uint8_t)e->draining;
    out o = {e->scratch};
    put_status(&o, e, status);
    put(&o, fields, fields_len);
    if (status != 204 && status != 304) {
        PUT(&o, "Content-Length: ");
        put_number(&o, body_len);
        PUT(&o, "\r\n");
    }
    put_connection(&o, c);
    PUT(&o, "\r\n");
    size_t head_len = (size_t)(o.at - e->scratch);
    if (c->is_head)
        body_len = 0;
    if (body_len <= FCAS_SCRATCH_SIZE - head_len) {
        put(&o, body, body_len);
        send_scratch(e, c, &o);
    } else {
        uint8_t *own = malloc(head_len + body_len);
        if (!own)
            return FCAS_E_NOMEM;
        memcpy(own, e->scratch, head_len);
        memcpy(own + head_len, body, body_len);
        c->mem = own;
        c->mem_borrowed = 0;
        c->mem_at = 0;
        c->mem_len = (uint32_t)(head_len + body_len);
    }
    fcas_conn_begin(e, c, status);
    unpark(e, c);
    return FCAS_OK;
}

fcas_status fcas_engine_respond_chunk(fcas_engine *e, uint64_t handle, const uint8_t hash[32], const uint8_t *fields,
                                      size_t fields_len, int notify)
{
    static const char DIGITS[] = "0123456789abcdef";
    fcas_conn        *c = parked_conn(e, handle);
    uint8_t           hex[HEX_LEN];
    if (!c)
        return FCAS_E_NOTFOUND;
    if (fields_len > FCAS_SCRATCH_SIZE / 2)
        return FCAS_E_ARG;
    for (size_t i = 0; i < 32; i++) {
        hex[2 * i] = (uint8_t)DIGITS[hash[i] >> 4];
        hex[2 * i + 1] = (uint8_t)DIGITS[hash[i] & 15];
    }
    content what = {.hex = hex, .fields = fields, .fields_len = fields_len};
    if (!e->has_table || fcas_table_lookup(&e->table, FCAS_ENTRY_CHUNK, hash, &what.place) != FCAS_OK)
        return FCAS_E_CORRUPT;
    what.size = what.place.length;
    e->next_bytes = what.place.length;
    c->close_after |= (uint8_t)e->draining;
    if (answer(e, c, NULL, &what) != 0)
        return FCAS_E_CORRUPT;
    c->notify = (uint8_t)notify;
    c->notify_handle = handle;
    unpark(e, c);
    return FCAS_OK;
}
