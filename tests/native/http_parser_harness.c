/* Runs the request parser over cases from stdin (u32 length, bytes; native byte order) under the sanitizers: whole,
 * byte by byte, cut in two at every byte, and with trailing bytes. Each feed is an exact heap copy, so that a read
 * past its end is seen. Prints one line per case:
 *
 *   result length method minor keep_alive path query range if_range if_none_match peer     (spans in hex, "-" if empty)
 *
 * and exits 2 where two ways of feeding disagree. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "http/parser.h"

static int parse_copy(fcas_http_request *r, const uint8_t *bytes, size_t n)
{
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy)
        abort();
    memcpy(copy, bytes, n);
    int result = fcas_http_parse(r, copy, n);
    free(copy);
    return result;
}

static void disagree(const char *how, size_t at, int result, int expected)
{
    fprintf(stderr, "%s at byte %zu: result %d, whole gave %d\n", how, at, result, expected);
    exit(2);
}

static void check_same(const char *how, size_t at, int result, const fcas_http_request *r, int expected,
                       const fcas_http_request *whole)
{
    if (result != expected || (result == FCAS_HTTP_DONE && memcmp(&r->method, &whole->method,
                                                                  sizeof *r - offsetof(fcas_http_request, method)) != 0))
        disagree(how, at, result, expected);
}

static void print_span(const uint8_t *bytes, fcas_http_span span)
{
    putchar(' ');
    if (span.len == 0)
        putchar('-');
    for (size_t i = 0; i < span.len; i++)
        printf("%02x", bytes[span.at + i]);
}

static void run_case(const uint8_t *bytes, size_t n)
{
    fcas_http_request whole, r;
    fcas_http_init(&whole);
    int expected = parse_copy(&whole, bytes, n);

    fcas_http_init(&r);
    int result = FCAS_HTTP_MORE;
    for (size_t k = 1; k <= n && result == FCAS_HTTP_MORE; k++) {
        result = parse_copy(&r, bytes, k);
        if (result == FCAS_HTTP_DONE && r.length != k)
            disagree("byte by byte: done before or after its length", k, result, expected);
    }
    check_same("byte by byte", n, result, &r, expected, &whole);

    for (size_t cut = 0; cut < n; cut++) {
        fcas_http_init(&r);
        result = parse_copy(&r, bytes, cut);
        if (result == FCAS_HTTP_MORE)
            result = parse_copy(&r, bytes, n);
        check_same("cut", cut, result, &r, expected, &whole);
    }

    if (expected == FCAS_HTTP_DONE) {
        uint8_t *longer = malloc(n + 9);
        if (!longer)
            abort();
        memcpy(longer, bytes, n);
        memcpy(longer + n, "\r\n\0GET / ", 9);
        fcas_http_init(&r);
        result = parse_copy(&r, longer, n + 9);
        free(longer);
        check_same("trailing bytes", n, result, &r, expected, &whole);
    }

    printf("%d %u %u %u %u", expected, whole.length, whole.method, whole.minor, whole.keep_alive);
    if (expected == FCAS_HTTP_DONE) {
        print_span(bytes, whole.path);
        print_span(bytes, whole.query);
        print_span(bytes, whole.range);
        print_span(bytes, whole.if_range);
        print_span(bytes, whole.if_none_match);
        print_span(bytes, whole.peer);
        uint64_t       first = 0, last = 0;
        const uint8_t *value = NULL;
        size_t         value_len = 0;
        uint8_t       *plain = malloc(whole.query.len + 1u);
        int range = fcas_http_range(bytes + whole.range.at, whole.range.len, 1000, &first, &last);
        printf(" %d:%llu:%llu", range, (unsigned long long)first, (unsigned long long)last);
        printf(" %d", fcas_http_etag_matches(bytes + whole.if_none_match.at, whole.if_none_match.len,
                                             (const uint8_t *)"abc", 3));
        unsigned found = fcas_http_query(bytes + whole.query.at, whole.query.len, "name", &value, &value_len);
        printf(" %u:%ld", found, found && plain ? fcas_http_unquote(value, value_len, plain) : 0L);
        free(plain);
    }
    putchar('\n');
}

int main(void)
{
    uint32_t n;
    while (fread(&n, sizeof n, 1, stdin) == 1) {
        uint8_t *bytes = malloc(n ? n : 1);
        if (!bytes || fread(bytes, 1, n, stdin) != n)
            return 3;
        run_case(bytes, n);
        free(bytes);
    }
    return 0;
}
