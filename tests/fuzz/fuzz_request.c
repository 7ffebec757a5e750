/* Fuzz target: the request parser and the field helpers, over arbitrary bytes in buffers of exactly their size.
 *
 * Checked beside the sanitizers: fed whole, byte by byte, cut once and with bytes behind it, a request gives the same
 * result; every place that a result names lies inside the request; ranges lie inside the content; what is unquoted
 * is not longer than it was. Links with libFuzzer (make fuzz) or with replay.c (the test suite). */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "http/parser.h"

#define INPUT_MAX 20000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition)
{
    if (!condition)
        abort();
}

/* Parse a prefix in a copy of its own, so that a read behind it is seen. */
static int parse_prefix(fcas_http_request *r, const uint8_t *data, size_t n)
{
    uint8_t *copy = malloc(n ? n : 1);
    require(copy != NULL);
    memcpy(copy, data, n);
    int result = fcas_http_parse(r, copy, n);
    free(copy);
    return result;
}

static void check_span(fcas_http_span span, const fcas_http_request *r)
{
    require(span.len == 0 || (size_t)span.at + span.len <= r->length);
}

static void check_fields(const fcas_http_request *r, const uint8_t *data)
{
    static const uint64_t SIZES[] = {0, 1, 1000, 1ull << 50, UINT64_MAX};
    const uint8_t        *value = NULL;
    size_t                value_len = 0;
    for (size_t i = 0; i < sizeof SIZES / sizeof *SIZES; i++) {
        uint64_t first = 0, last = 0;
        int      status = fcas_http_range(data + r->range.at, r->range.len, SIZES[i], &first, &last);
        require(status == 200 || status == 206 || status == 416);
        require(status != 206 || (first <= last && last < SIZES[i]));
    }
    fcas_http_etag_matches(data + r->if_none_match.at, r->if_none_match.len, data + r->if_range.at, r->if_range.len);
    if (fcas_http_query(data + r->query.at, r->query.len, "name", &value, &value_len)) {
        uint8_t *plain = malloc(value_len ? value_len : 1);
        require(plain != NULL);
        require(fcas_http_unquote(value, value_len, plain) <= (long)value_len);
        free(plain);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fcas_http_request whole, r;
    if (size < 1 || size > INPUT_MAX)
        return 0;
    size_t cut = data[0] * (size - 1) / 255;
    data++, size--;
    fcas_http_init(&whole);
    int expected = parse_prefix(&whole, data, size);

    fcas_http_init(&r);
    int result = FCAS_HTTP_MORE;
    /* No request is longer than the limits: after them the parser has decided. */
    size_t n = 0;
    while (n < size && result == FCAS_HTTP_MORE)
        result = parse_prefix(&r, data, ++n);
    require(n <= FCAS_HTTP_HEAD_MAX + 1 || result != FCAS_HTTP_MORE);
    require(result == (size ? expected : FCAS_HTTP_MORE));
    require(result != FCAS_HTTP_DONE || r.length == n);

    fcas_http_init(&r);
    result = parse_prefix(&r, data, cut);
    if (result == FCAS_HTTP_MORE)
        result = parse_prefix(&r, data, size);
    require(result == expected);
    if (expected != FCAS_HTTP_DONE)
        return 0;
    require(memcmp(&r.method, &whole.method, sizeof r - offsetof(fcas_http_request, method)) == 0);
    require(whole.length <= size && whole.length <= FCAS_HTTP_HEAD_MAX);
    require(whole.method == FCAS_HTTP_GET || whole.method == FCAS_HTTP_HEAD);
    require(whole.path.len == 0 || data[whole.path.at] == '/');
    check_span(whole.path, &whole);
    check_span(whole.query, &whole);
    check_span(whole.range, &whole);
    check_span(whole.if_range, &whole);
    check_span(whole.if_none_match, &whole);
    check_span(whole.peer, &whole);
    check_fields(&whole, data);
    return 0;
}
