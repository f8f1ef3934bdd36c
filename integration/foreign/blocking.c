/* The simplest server on sd_listen_fds(3): waits in accept(2), answers one client at a time.
 *
 *     cc -o blocking blocking.c -lsystemd
 *
 * It knows nothing of sdlisten, of event loops, or of O_NONBLOCK: if somebody else who holds the listener sets
 * that flag, accept(2) fails here and so does the program. */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <sys/socket.h>
#include <unistd.h>

/* On SIGTERM our copy of the listener goes; nothing else is open at that number before the program ends. An
 * accept(2) that was waiting is begun anew (SA_RESTART) and ends with EBADF, as does the next one; what was
 * accepted is answered first. */
static void leave(int number)
{
    (void)number;
    close(SD_LISTEN_FDS_START);
}

static void answer(int connection)
{
    char request[4096 + 1], text[256], body[16];
    size_t have = 0;

    do {
        ssize_t got = read(connection, request + have, sizeof request - 1 - have);
        if (got <= 0)
            return;
        have += (size_t)got;
        request[have] = '\0';
    } while (!strstr(request, "\r\n\r\n"));

    const char *generation = getenv("SDLISTEN_GENERATION");
    int length = snprintf(body, sizeof body, "%ld\n", (long)getpid());
    length = snprintf(text, sizeof text,
                      "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\nGeneration: %s\r\n\r\n%s",
                      length, generation ? generation : "0", body);
    if (write(connection, text, (size_t)length) != length)
        perror("write");
}

int main(void)
{
    struct sigaction on_term = {.sa_handler = leave, .sa_flags = SA_RESTART};

    if (sd_listen_fds(1) != 1) {
        fputs("expected one socket, passed as systemd does\n", stderr);
        return EXIT_FAILURE;
    }
    sigaction(SIGTERM, &on_term, NULL);
    signal(SIGPIPE, SIG_IGN);
    sd_notify(0, "READY=1");
    for (;;) {
        int connection = accept(SD_LISTEN_FDS_START, NULL, NULL);
        if (connection >= 0) {
            answer(connection);
            close(connection);
        } else if (errno == EBADF) {
            return EXIT_SUCCESS;
        } else if (errno != ECONNABORTED) {
            perror("accept");
            return EXIT_FAILURE;
        }
    }
}
