/* The least that a sendfile server can do: what bench/serve_more.py compares the engine with.
 *
 *   bare_loop FOLDER
 *
 * One epoll, edge-triggered; each file of FOLDER is opened before the start. A request is a recv, a search for its end,
 * a hash look-up of the 64 digits after "GET /chunks/", a header by send with MSG_MORE and sendfile until the socket is
 * full. No limits, no deadlines, no other methods or targets: whatever is unexpected ends the connection. Prints its
 * port, serves until it is killed. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define TABLE    16384u /* slots; a power of two, well above the number of files */
#define NAME_LEN 64u
#define BATCH    256

typedef struct {
    char  name[NAME_LEN];
    int   fd;
    off_t size;
} file;

typedef struct {
    int         fd;
    const file *sending;
    off_t       at;
    size_t      have;
    char        request[2048];
} connection;

static file table[TABLE];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static file *slot_of(const char *name)
{
    uint64_t h = 0;
    memcpy(&h, name, sizeof h);
    for (uint32_t i = (uint32_t)(h * 0x9e3779b97f4a7c15ull >> 50);; i++) {
        file *f = &table[i % TABLE];
        if (f->fd == 0 || memcmp(f->name, name, NAME_LEN) == 0)
            return f;
    }
}

static void open_files(const char *folder)
{
    struct rlimit most;
    if (getrlimit(RLIMIT_NOFILE, &most) == 0) {
        most.rlim_cur = most.rlim_max;
        setrlimit(RLIMIT_NOFILE, &most);
    }
    DIR *d = opendir(folder);
    if (!d || chdir(folder) != 0)
        fail(folder);
    for (struct dirent *entry; (entry = readdir(d));) {
        struct stat st;
        if (strlen(entry->d_name) != NAME_LEN)
            continue;
        file *f = slot_of(entry->d_name);
        f->fd = open(entry->d_name, O_RDONLY | O_CLOEXEC);
        if (f->fd < 0 || fstat(f->fd, &st) != 0)
            fail(entry->d_name);
        memcpy(f->name, entry->d_name, NAME_LEN);
        f->size = st.st_size;
    }
    closedir(d);
}

/* 1 = all was sent, 0 = the socket is full, -1 = over. */
static int send_on(connection *c)
{
    while (c->at < c->sending->size) {
        ssize_t n = sendfile(c->fd, c->sending->fd, &c->at, (size_t)(c->sending->size - c->at));
        if (n <= 0)
            return n < 0 && errno == EAGAIN ? 0 : -1;
    }
    c->sending = NULL;
    return 1;
}

static int answer(connection *c)
{
    static const char GET[] = "GET /chunks/";
    char              head[128];
    if (memcmp(c->request, GET, sizeof GET - 1) != 0)
        return -1;
    const file *f = slot_of(c->request + sizeof GET - 1);
    if (f->fd == 0)
        return -1;
    int n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Length: %lld\r\n\r\n", (long long)f->size);
    if (send(c->fd, head, (size_t)n, MSG_NOSIGNAL | MSG_MORE) != n)
        return -1;
    c->sending = f;
    c->at = 0;
    c->have = 0;
    return 1;
}

/* Go on until nothing more can be done; -1 = over. */
static int run(connection *c)
{
    for (;;) {
        if (c->sending) {
            int sent = send_on(c);
            if (sent <= 0)
                return sent;
        }
        ssize_t n = recv(c->fd, c->request + c->have, sizeof c->request - 1 - c->have, 0);
        if (n <= 0)
            return n < 0 && errno == EAGAIN ? 0 : -1;
        c->have += (size_t)n;
        if (c->have < NAME_LEN + 16 || memcmp(c->request + c->have - 4, "\r\n\r\n", 4) != 0)
            continue;
        if (answer(c) < 0)
            return -1;
    }
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 64;
    signal(SIGPIPE, SIG_IGN);
    open_files(argv[1]);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t          length = sizeof address;
    int                one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), ep = epoll_create1(0);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(listener, IPPROTO_TCP, TCP_CONGESTION, "reno", 4); /* as the engine's listener */
    if (listener < 0 || ep < 0 || bind(listener, (struct sockaddr *)&address, length) != 0 ||
        listen(listener, 1024) != 0 || getsockname(listener, (struct sockaddr *)&address, &length) != 0)
        fail("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, ready[BATCH];
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &event);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(ep, ready, BATCH, -1);
        for (int i = 0; i < n; i++) {
            connection *c = ready[i].data.ptr;
            if (c) {
                if (run(c) < 0) {
                    close(c->fd);
                    free(c);
                }
                continue;
            }
            for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
                c = calloc(1, sizeof *c);
                if (!c)
                    fail("calloc");
                c->fd = fd;
                event = (struct epoll_event){.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
                epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event);
            }
        }
    }
}
