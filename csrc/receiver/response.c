#include "receiver/response.h"

#include <string.h>

static bool is_token(uint8_t c)
{
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')) {
        return true;
    }
    return c != 0 && c < 128 && strchr("!#$%&'*+-.^_`|~", c) != NULL;
}

static uint8_t lower(uint8_t c)
{
    return c >= 'A' && c <= 'Z' ? (uint8_t)(c | 0x20) : c;
}

/* Whether the n bytes at p are the lower-case word, in any case. */
static bool is_word(const uint8_t *p, size_t n, const char *word)
{
    if (strlen(word) != n) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        if (lower(p[i]) != (uint8_t)word[i]) {
            return false;
        }
    }
    return true;
}

/* 1..15 digits, nothing else. */
static bool number(const uint8_t *p, size_t n, uint64_t *out)
{
    uint64_t v = 0;
    if (n == 0 || n > 15) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        if (p[i] < '0' || p[i] > '9') {
            return false;
        }
        v = v * 10 + (uint64_t)(p[i] - '0');
    }
    *out = v;
    return true;
}

typedef struct {
    bool has_length;
} seen_fields;

static int field(const uint8_t *name, size_t n_name, const uint8_t *value, size_t n_value, fcas_rx_response *out,
                 seen_fields *seen)
{
    if (is_word(name, n_name, "content-length")) {
        if (seen->has_length || !number(value, n_value, &out->length)) {
            return FCAS_RX_REFUSE_BAD_LENGTH;
        }
        seen->has_length = true;
    } else if (is_word(name, n_name, "transfer-encoding")) {
        return FCAS_RX_REFUSE_TRANSFER_ENCODING;
    } else if (is_word(name, n_name, "content-encoding")) {
        return FCAS_RX_REFUSE_CONTENT_ENCODING;
    } else if (is_word(name, n_name, "connection")) {
        out->close = out->close || is_word(value, n_value, "close");
    } else if (is_word(name, n_name, "x-fastcas-chunk")) {
        if (out->has_chunk || !number(value, n_value, &out->chunk)) {
            return FCAS_RX_REFUSE_CHUNK_NUMBER;
        }
        out->has_chunk = true;
    }
    return 0;
}

/* One field line without its CRLF. */
static int field_line(const uint8_t *line, size_t n, fcas_rx_response *out, seen_fields *seen)
{
    size_t n_name = 0;
    while (n_name < n && is_token(line[n_name])) {
        n_name++;
    }
    if (n_name == 0 || n_name == n || line[n_name] != ':') {
        return FCAS_RX_REFUSE_HEADER_SYNTAX;
    }
    size_t from = n_name + 1, to = n;
    while (from < to && (line[from] == ' ' || line[from] == '\t')) {
        from++;
    }
    while (to > from && (line[to - 1] == ' ' || line[to - 1] == '\t')) {
        to--;
    }
    for (size_t i = from; i < to; i++) {
        if ((line[i] < 0x20 && line[i] != '\t') || line[i] == 0x7f) {
            return FCAS_RX_REFUSE_HEADER_SYNTAX;
        }
    }
    return field(line, n_name, line + from, to - from, out, seen);
}

static int status_line(const uint8_t *line, size_t n, fcas_rx_response *out)
{
    if (n < 12 || memcmp(line, "HTTP/1.1 ", 9) != 0 || (n > 12 && line[12] != ' ')) {
        return FCAS_RX_REFUSE_STATUS_LINE;
    }
    uint64_t status;
    if (!number(line + 9, 3, &status) || status < 100 || status > 599) {
        return FCAS_RX_REFUSE_STATUS_LINE;
    }
    for (size_t i = 12; i < n; i++) {
        if ((line[i] < 0x20 && line[i] != '\t') || line[i] == 0x7f) {
            return FCAS_RX_REFUSE_STATUS_LINE;
        }
    }
    out->status = (uint16_t)status;
    if (status < 200) {
        return FCAS_RX_REFUSE_INTERIM;
    }
    return status >= 300 && status < 400 ? FCAS_RX_REFUSE_REDIRECT : 0;
}

int fcas_rx_parse_response(const uint8_t *p, size_t n, fcas_rx_response *out)
{
    const size_t limit = n < FCAS_RX_HEAD_MAX ? n : FCAS_RX_HEAD_MAX;
    static const char prefix[] = "HTTP/1.1 ";
    seen_fields seen = {false};
    size_t at = 0;
    int why;

    memset(out, 0, sizeof *out);
    /* Refuse garbage from its first byte: it may never send a line end. */
    if (memcmp(p, prefix, limit < 9 ? limit : 9) != 0) {
        return -FCAS_RX_REFUSE_STATUS_LINE;
    }
    for (bool first = true;; first = false) {
        const uint8_t *end = memchr(p + at, '\n', limit - at);
        if (end == NULL) {
            return n >= FCAS_RX_HEAD_MAX ? -FCAS_RX_REFUSE_HEADERS_TOO_LONG : 0;
        }
        size_t length = (size_t)(end - (p + at));
        if (length == 0 || end[-1] != '\r') {
            return -(first ? FCAS_RX_REFUSE_STATUS_LINE : FCAS_RX_REFUSE_HEADER_SYNTAX);
        }
        length--;
        if (!first && length == 0) {
            at += 2;
            break;
        }
        why = first ? status_line(p + at, length, out) : field_line(p + at, length, out, &seen);
        if (why != 0) {
            return -why;
        }
        at += length + 2;
    }
    if (out->status == 204) {
        if (seen.has_length && out->length != 0) {
            return -FCAS_RX_REFUSE_BAD_LENGTH;
        }
    } else if (!seen.has_length) {
        return -FCAS_RX_REFUSE_NO_LENGTH;
    }
    out->n_head = at;
    return 1;
}
