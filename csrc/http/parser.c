/* The request parser: one pass over the bytes, line by line. See parser.h. */
#include "http/parser.h"

#include <string.h>

#include "common/hex.h"

enum { PHASE_LINE = 0, PHASE_FIELDS = 1 };

/* fields that may occur once, or whose occurrence matters */
enum {
    SEEN_HOST          = 1u << 0,
    SEEN_LENGTH        = 1u << 1,
    SEEN_RANGE         = 1u << 2,
    SEEN_IF_RANGE      = 1u << 3,
    SEEN_IF_NONE_MATCH = 1u << 4,
    SEEN_PEER          = 1u << 5,
    SEEN_EXPECT        = 1u << 6,
    SEEN_CLOSE         = 1u << 7,
    SEEN_KEEP_ALIVE    = 1u << 8,
    SEEN_BODY          = 1u << 9,
};

/* character classes */
enum {
    TOKEN  = 1, /* tchar of RFC 9110 */
    TARGET = 2, /* pchar, '/', '?' of RFC 3986; '%' is checked separately */
    VALUE  = 4, /* field-vchar, obs-text, space, tab */
    HOST   = 8, /* reg-name, IP-literal */
    HEX    = 16
};

#define T TOKEN
#define U TARGET
#define V VALUE
#define H HOST
#define X HEX
static const uint8_t CLASS[256] = {
    ['\t'] = V, [' '] = V, ['!'] = T | U | V | H, ['"'] = V, ['#'] = T | V, ['$'] = T | U | V | H,
    ['%'] = T | U | V | H, ['&'] = T | U | V | H, ['\''] = T | U | V | H, ['('] = U | V | H, [')'] = U | V | H,
    ['*'] = T | U | V | H, ['+'] = T | U | V | H, [','] = U | V | H, ['-'] = T | U | V | H, ['.'] = T | U | V | H,
    ['/'] = U | V, ['0' ... '9'] = T | U | V | H | X, [':'] = U | V, [';'] = U | V | H, ['<'] = V,
    ['='] = U | V | H, ['>'] = V, ['?'] = U | V, ['@'] = U | V, ['A' ... 'F'] = T | U | V | H | X,
    ['G' ... 'Z'] = T | U | V | H, ['['] = V, ['\\'] = V, [']'] = V, ['^'] = T | V, ['_'] = T | U | V | H,
    ['`'] = T | V, ['a' ... 'f'] = T | U | V | H | X, ['g' ... 'z'] = T | U | V | H, ['{'] = V, ['|'] = T | V,
    ['}'] = V, ['~'] = T | U | V | H, [0x80 ... 0xff] = V,
};
#undef T
#undef U
#undef V
#undef H
#undef X

static int is_class(uint8_t c, int class) { return (CLASS[c] & class) != 0; }

/* How many of eight bytes come before the first control character (what VALUE excludes, and the tab); 8 = there is none.
 * The tests borrow upwards only, so that the lowest mark is always a true one. */
static size_t before_control(const uint8_t p[8])
{
    const uint64_t ONES = UINT64_C(0x0101010101010101), TOPS = 0x80 * ONES;
    uint64_t       x = fcas_load_le64(p), del = x ^ 0x7f * ONES;
    uint64_t       marks = (((x - 0x20 * ONES) & ~x) | ((del - ONES) & ~del)) & TOPS;
    return marks ? (size_t)__builtin_ctzll(marks) / 8 : 8;
}

static uint8_t lower(uint8_t c) { return c >= 'A' && c <= 'Z' ? (uint8_t)(c | 0x20) : c; }

/* Whether p[0..n) is `word` (lower case, NUL-terminated), ignoring case. */
static int is_word(const uint8_t *p, size_t n, const char *word)
{
    if (n != strlen(word))
        return 0;
    for (size_t i = 0; i < n; i++)
        if (lower(p[i]) != (uint8_t)word[i])
            return 0;
    return 1;
}

void fcas_http_init(fcas_http_request *r)
{
    memset(r, 0, sizeof *r);
}

/* host [":" port], host a reg-name, an IPv4 address or a bracketed IPv6 literal. */
static int is_authority(const uint8_t *p, size_t n)
{
    size_t i = 0;
    if (n && p[0] == '[') {
        for (i = 1; i < n && p[i] != ']'; i++)
            if (!is_class(p[i], HEX) && p[i] != ':' && p[i] != '.')
                return 0;
        if (i == n || i == 1)
            return 0;
        i++;
    } else {
        while (i < n && is_class(p[i], HOST))
            i++;
        if (i == 0)
            return 0;
    }
    if (i == n)
        return 1;
    if (p[i++] != ':' || n - i > 5)
        return 0;
    for (; i < n; i++)
        if (p[i] < '0' || p[i] > '9')
            return 0;
    return 1;
}

/* The request line, p[0..n) without CRLF, n < FCAS_HTTP_LINE_MAX. */
static int parse_line(fcas_http_request *r, const uint8_t *p, size_t n)
{
    size_t i = 0;
    while (i < n && is_class(p[i], TOKEN))
        i++;
    size_t method_len = i;
    if (method_len == 0 || i == n || p[i] != ' ')
        return 400;
    size_t target = ++i, query = 0;
    while (i < n && p[i] != ' ') {
        if (p[i] == '/') { /* a hash may follow */
            uint64_t values;
            for (i++; i + 8 <= n && fcas_hex_values8(p + i, &values);)
                i += 8;
            continue;
        }
        if (!is_class(p[i], TARGET) && !((p[i] == '[' || p[i] == ']') && p[target] != '/'))
            return 400;
        if (p[i] == '%' && !(i + 2 < n && is_class(p[i + 1], HEX) && is_class(p[i + 2], HEX)))
            return 400;
        if (p[i] == '?' && !query)
            query = i;
        i++;
    }
    size_t target_end = i;
    if (target_end == target || n - i != 9 || memcmp(p + i, " HTTP/", 6) != 0 || p[i + 7] != '.' || p[i + 6] < '0' ||
        p[i + 6] > '9' || p[i + 8] < '0' || p[i + 8] > '9')
        return 400;
    if (p[i + 6] != '1' || p[i + 8] > '1')
        return 505;
    r->minor = (uint8_t)(p[i + 8] - '0');
    r->keep_alive = r->minor;
    if (method_len == 3 && memcmp(p, "GET", 3) == 0)
        r->method = FCAS_HTTP_GET;
    else if (method_len == 4 && memcmp(p, "HEAD", 4) == 0)
        r->method = FCAS_HTTP_HEAD;
    else
        return 405;

    size_t path_end = query ? query : target_end;
    if (p[target] != '/') {
        /* absolute-form: only the path matters; the authority is checked and otherwise ignored */
        if (target_end - target < 8 || !is_word(p + target, 7, "http://"))
            return 400;
        size_t authority = target + 7;
        target = authority;
        while (target < path_end && p[target] != '/')
            target++;
        if (!is_authority(p + authority, target - authority))
            return 400;
        /* brackets belong to an IPv6 address there, and nowhere else */
        if (memchr(p + target, '[', target_end - target) || memchr(p + target, ']', target_end - target))
            return 400;
    }
    r->path = (fcas_http_span){(uint16_t)target, (uint16_t)(path_end - target)};
    if (query)
        r->query = (fcas_http_span){(uint16_t)(query + 1), (uint16_t)(target_end - query - 1)};
    return FCAS_HTTP_MORE;
}

static int once(fcas_http_request *r, uint16_t bit)
{
    if (r->seen & bit)
        return 400;
    r->seen |= bit;
    return FCAS_HTTP_MORE;
}

static int keep_span(fcas_http_request *r, uint16_t bit, fcas_http_span *where, fcas_http_span value)
{
    *where = value;
    return once(r, bit);
}

/* The Connection field: a list of tokens of which two matter. */
static int parse_connection(fcas_http_request *r, const uint8_t *p, size_t n)
{
    size_t i = 0;
    while (i < n) {
        while (i < n && (p[i] == ' ' || p[i] == '\t' || p[i] == ','))
            i++;
        size_t start = i;
        while (i < n && p[i] != ',')
            i++;
        size_t end = i;
        while (end > start && (p[end - 1] == ' ' || p[end - 1] == '\t'))
            end--;
        for (size_t j = start; j < end; j++)
            if (!is_class(p[j], TOKEN))
                return 400;
        if (is_word(p + start, end - start, "close"))
            r->seen |= SEEN_CLOSE;
        else if (is_word(p + start, end - start, "keep-alive"))
            r->seen |= SEEN_KEEP_ALIVE;
    }
    return FCAS_HTTP_MORE;
}

/* Content-Length: digits only, once. Any value but zero is a body, refused at the end of the head. */
static int parse_length(fcas_http_request *r, const uint8_t *p, size_t n)
{
    if (n == 0 || n > 18)
        return 400;
    for (size_t i = 0; i < n; i++) {
        if (p[i] < '0' || p[i] > '9')
            return 400;
        if (p[i] != '0')
            r->seen |= SEEN_BODY;
    }
    return once(r, SEEN_LENGTH);
}

/* One field line, p[0..n) without CRLF; `at` is its offset in the request. */
static int parse_field(fcas_http_request *r, const uint8_t *p, size_t n, size_t at)
{
    if (++r->n_fields > FCAS_HTTP_FIELDS_MAX)
        return 431;
    size_t name_len = 0;
    while (name_len < n && is_class(p[name_len], TOKEN))
        name_len++;
    if (name_len == 0 || name_len == n || p[name_len] != ':')
        return 400;
    size_t start = name_len + 1, end = n;
    while (start < end && (p[start] == ' ' || p[start] == '\t'))
        start++;
    while (end > start && (p[end - 1] == ' ' || p[end - 1] == '\t'))
        end--;
    const uint8_t *value = p + start;
    size_t value_len = end - start;
    fcas_http_span span = {(uint16_t)(at + start), (uint16_t)value_len};

    switch (name_len) {
    case 4:
        if (is_word(p, 4, "host"))
            return is_authority(value, value_len) ? once(r, SEEN_HOST) : 400;
        break;
    case 5:
        if (is_word(p, 5, "range"))
            return keep_span(r, SEEN_RANGE, &r->range, span);
        break;
    case 6:
        if (is_word(p, 6, "expect"))
            return once(r, SEEN_EXPECT);
        break;
    case 8:
        if (is_word(p, 8, "if-range"))
            return keep_span(r, SEEN_IF_RANGE, &r->if_range, span);
        break;
    case 10:
        if (is_word(p, 10, "connection"))
            return parse_connection(r, value, value_len);
        break;
    case 12:
        if (is_word(p, 12, "fastcas-peer"))
            return keep_span(r, SEEN_PEER, &r->peer, span);
        break;
    case 13:
        if (is_word(p, 13, "if-none-match") && !(r->seen & SEEN_IF_NONE_MATCH))
            return keep_span(r, SEEN_IF_NONE_MATCH, &r->if_none_match, span);
        break;
    case 14:
        if (is_word(p, 14, "content-length"))
            return parse_length(r, value, value_len);
        break;
    case 17:
        if (is_word(p, 17, "transfer-encoding"))
            return 400;
        break;
    default:
        break;
    }
    return FCAS_HTTP_MORE;
}

/* The empty line: what only the whole head decides. */
static int finish(fcas_http_request *r, size_t length)
{
    if (r->minor == 1 && !(r->seen & SEEN_HOST))
        return 400;
    if (r->seen & SEEN_BODY)
        return 400;
    if (r->seen & SEEN_EXPECT)
        return 417;
    if (r->seen & SEEN_CLOSE)
        r->keep_alive = 0;
    else if (r->seen & SEEN_KEEP_ALIVE)
        r->keep_alive = 1;
    r->length = (uint16_t)length;
    return FCAS_HTTP_DONE;
}

int fcas_http_parse(fcas_http_request *r, const uint8_t *buf, size_t n)
{
    size_t i = r->scan_at;
    for (;;) {
        size_t line_at = r->line_at;
        size_t limit = r->phase == PHASE_LINE ? FCAS_HTTP_LINE_MAX : FCAS_HTTP_HEAD_MAX;
        int    too_long = r->phase == PHASE_LINE ? 414 : 431;
        /* to the line's CR; the limit counts the LF, too */
        size_t stop = n < limit - 1 ? n : limit - 1;
        for (size_t step = 8; step == 8 && i + 8 <= stop; i += step)
            step = before_control(buf + i);
        while (i < stop && is_class(buf[i], VALUE))
            i++;
        if (i >= stop) { /* beyond it when the last line ended exactly at the limit */
            r->scan_at = (uint16_t)i;
            return i >= limit - 1 ? too_long : FCAS_HTTP_MORE;
        }
        if (buf[i] != '\r')
            return 400;
        if (i + 1 == n) {
            r->scan_at = (uint16_t)i;
            return FCAS_HTTP_MORE;
        }
        if (buf[i + 1] != '\n')
            return 400;
        const uint8_t *line = buf + line_at;
        size_t         len = i - line_at;
        i += 2;
        int result;
        if (r->phase == PHASE_LINE) {
            result = parse_line(r, line, len);
            r->phase = PHASE_FIELDS;
        } else if (len == 0) {
            return finish(r, i);
        } else {
            result = parse_field(r, line, len, line_at);
        }
        if (result != FCAS_HTTP_MORE)
            return result;
        r->line_at = r->scan_at = (uint16_t)i;
    }
}

/* Digits from p[*i], saturating at UINT64_MAX. Returns how many there were. */
static size_t number(const uint8_t *p, size_t n, size_t *i, uint64_t *out)
{
    size_t   start = *i;
    uint64_t v = 0;
    for (; *i < n && p[*i] >= '0' && p[*i] <= '9'; (*i)++) {
        uint64_t digit = (uint64_t)(p[*i] - '0');
        v = v > (UINT64_MAX - digit) / 10 ? UINT64_MAX : v * 10 + digit;
    }
    *out = v;
    return *i - start;
}

int fcas_http_range(const uint8_t *value, size_t n, uint64_t size, uint64_t *first, uint64_t *last)
{
    if (n < 7 || !is_word(value, 6, "bytes="))
        return 200;
    size_t   i = 6;
    uint64_t a, b;
    size_t   a_digits = number(value, n, &i, &a);
    if (i == n || value[i] != '-')
        return 200;
    i++;
    size_t b_digits = number(value, n, &i, &b);
    if (i != n || (a_digits == 0 && b_digits == 0))
        return 200;
    if (a_digits == 0) {
        if (b == 0 || size == 0)
            return 416;
        *first = b >= size ? 0 : size - b;
        *last = size - 1;
        return 206;
    }
    if (b_digits && b < a)
        return 200;
    if (a >= size)
        return 416;
    *first = a;
    *last = b_digits && b < size - 1 ? b : size - 1;
    return 206;
}

int fcas_http_etag_matches(const uint8_t *value, size_t n, const uint8_t *tag, size_t tag_len)
{
    if (n == 1 && value[0] == '*')
        return 1;
    size_t i = 0;
    while (i < n) {
        while (i < n && (value[i] == ' ' || value[i] == '\t' || value[i] == ','))
            i++;
        if (n - i >= 2 && value[i] == 'W' && value[i + 1] == '/')
            i += 2;
        if (i == n || value[i] != '"')
            return 0;
        size_t start = ++i;
        while (i < n && value[i] != '"')
            i++;
        if (i == n)
            return 0;
        if (i - start == tag_len && memcmp(value + start, tag, tag_len) == 0)
            return 1;
        i++;
    }
    return 0;
}

unsigned fcas_http_query(const uint8_t *query, size_t n, const char *key, const uint8_t **value, size_t *value_len)
{
    size_t   key_len = strlen(key), i = 0;
    unsigned found = 0;
    while (i < n) {
        size_t end = i;
        while (end < n && query[end] != '&')
            end++;
        if (end - i > key_len && query[i + key_len] == '=' && memcmp(query + i, key, key_len) == 0) {
            *value = query + i + key_len + 1;
            *value_len = end - i - key_len - 1;
            found++;
        }
        i = end + 1;
    }
    return found;
}

static unsigned hex_digit(uint8_t c)
{
    return c <= '9' ? (unsigned)(c - '0') : (unsigned)(lower(c) - 'a' + 10);
}

long fcas_http_unquote(const uint8_t *text, size_t n, uint8_t *out)
{
    long len = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] != '%') {
            out[len++] = text[i];
            continue;
        }
        if (i + 2 >= n || !is_class(text[i + 1], HEX) || !is_class(text[i + 2], HEX))
            return -1;
        out[len++] = (uint8_t)(hex_digit(text[i + 1]) << 4 | hex_digit(text[i + 2]));
        i += 2;
    }
    return len;
}
