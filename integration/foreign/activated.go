// A server of net/http on the socket that coreos/go-systemd's activation package finds.
//
// It never says that it is ready, and drains on SIGTERM by http.Server.Shutdown.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/activation"
)

func answer(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Generation", os.Getenv("SDLISTEN_GENERATION"))
	fmt.Fprintln(w, os.Getpid())
}

func main() {
	listeners, err := activation.Listeners()
	if err != nil || len(listeners) != 1 || listeners[0] == nil {
		log.Fatalf("expected one socket, passed as systemd does; got %v, %v", listeners, err)
	}
	order := make(chan os.Signal, 1)
	signal.Notify(order, syscall.SIGTERM)
	server := &http.Server{Handler: http.HandlerFunc(answer)}
	go func() {
		if err := server.Serve(listeners[0]); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	<-order
	if err := server.Shutdown(context.Background()); err != nil {
		log.Fatal(err)
	}
}
