/* Strict parser for the requests that the data port accepts: GET and HEAD of HTTP/1.0 and 1.1 without a body.
 *
 * A pure function over the bytes of one request, resumable: fed whole or byte by byte it gives the same result
 * after the same byte. No allocation, no copy: the result names places in the caller's buffer by offset, so the
 * caller may move the bytes between two calls.
 *
 * Grammar (RFC 9112, its strict half): CRLF only, no bare CR, LF or NUL, no obs-fold, no space before a colon,
 * token-only names, visible ASCII in the target, version exactly HTTP/1.0 or HTTP/1.1, exactly one valid Host in 1.1,
 * at most one of Content-Length, Range, If-Range, Expect, Fastcas-Peer. Errors are found at the earliest byte that
 * decides them. After an error the rest of the stream has no meaning: one response, then close. */
#ifndef FCAS_HTTP_PARSER_H
#define FCAS_HTTP_PARSER_H

#include <stddef.h>
#include <stdint.h>

#define FCAS_HTTP_LINE_MAX   1024u /* request line with its CRLF; beyond: 414 */
#define FCAS_HTTP_HEAD_MAX   8192u /* request line and fields with the empty line; beyond: 431 */
#define FCAS_HTTP_FIELDS_MAX 64u   /* beyond: 431 */

enum { FCAS_HTTP_MORE = 0, FCAS_HTTP_DONE = 1 };
enum { FCAS_HTTP_GET = 1, FCAS_HTTP_HEAD = 2 };

/* A place in the request's bytes. len 0 = absent or empty. */
typedef struct {
    uint16_t at;
    uint16_t len;
} fcas_http_span;

typedef struct {
    /* where the scan stands; the caller leaves these alone */
    uint16_t line_at;
    uint16_t scan_at;
    uint16_t seen;
    uint8_t  phase;
    uint8_t  n_fields;
    /* the request, complete on FCAS_HTTP_DONE; method and keep_alive also mean what they can after an error */
    uint8_t  method;     /* FCAS_HTTP_GET or FCAS_HTTP_HEAD */
    uint8_t  minor;      /* HTTP/1.minor */
    uint8_t  keep_alive; /* what the client asked for, with the version's default */
    uint8_t  reserved;
    uint16_t length;     /* bytes of the request with its empty line: where the next one starts */
    fcas_http_span path; /* begins with '/', also for an absolute-form target ("http://host" alone: len 0) */
    fcas_http_span query; /* after the first '?' */
    fcas_http_span range;
    fcas_http_span if_range;
    fcas_http_span if_none_match; /* the first one */
    fcas_http_span peer;          /* Fastcas-Peer */
} fcas_http_request;

/* Start a request. */
void fcas_http_init(fcas_http_request *r);

/* Go on parsing: buf[0..n) are all bytes of the request so far (earlier calls saw a prefix of them); bytes after
 * the request are not looked at. FCAS_HTTP_DONE; FCAS_HTTP_MORE; or the status to answer with: 400, 405, 414, 417,
 * 431, 505. Cost: each byte is looked at once over all calls. Never reads outside buf[0..n). hot */
int fcas_http_parse(fcas_http_request *r, const uint8_t *buf, size_t n);

/* A Range field against a representation of `size` bytes. Returns 206 with *first and *last set, 416, or 200 when the
 * field is to be ignored (another unit, malformed, more than one range). */
int fcas_http_range(const uint8_t *value, size_t n, uint64_t size, uint64_t *first, uint64_t *last);

/* Whether an If-None-Match value names the entity tag (given without quotes), by weak comparison, or is "*". */
int fcas_http_etag_matches(const uint8_t *value, size_t n, const uint8_t *tag, size_t tag_len);

/* The value of `key` in a query string: sets *value and *value_len (still percent-encoded), returns how often the
 * key occurs. */
unsigned fcas_http_query(const uint8_t *query, size_t n, const char *key, const uint8_t **value, size_t *value_len);

/* Undo percent-encoding into out (room for n bytes). Returns the length, or -1 for a malformed escape. */
long fcas_http_unquote(const uint8_t *text, size_t n, uint8_t *out);

#endif
