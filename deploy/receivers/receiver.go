package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const tolerance = 5 * time.Minute

var (
	secret, _ = base64.StdEncoding.DecodeString(strings.TrimPrefix(os.Getenv("WEBHOOK_SECRET"), "whsec_"))
	lock      sync.Mutex
	seen      = map[string]int64{} // event id -> highest token; a table with a unique key in a real receiver
)

func isSigned(header http.Header, body []byte) bool {
	seconds, err := strconv.ParseInt(header.Get("webhook-timestamp"), 10, 64)
	if err != nil || time.Since(time.Unix(seconds, 0)).Abs() > tolerance {
		return false
	}
	mac := hmac.New(sha256.New, secret)
	fmt.Fprintf(mac, "%s.%d.%s", header.Get("webhook-id"), seconds, body)
	expected := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
	for _, signature := range strings.Fields(header.Get("webhook-signature")) {
		if hmac.Equal([]byte(signature), []byte(expected)) {
			return true
		}
	}
	return false
}

func accept(event string, token int64) string {
	lock.Lock()
	defer lock.Unlock()
	known, ok := seen[event]
	switch {
	case !ok:
		seen[event] = token
		return "new" // do what the event says, in the transaction that writes its id
	case token > known:
		seen[event] = token
		return "duplicate"
	default:
		return "late duplicate"
	}
}

func main() {
	if len(secret) == 0 {
		log.Fatal("WEBHOOK_SECRET must be whsec_<base64>")
	}
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(response, request.Body, 8<<20))
		if err != nil || !isSigned(request.Header, body) {
			http.Error(response, "bad signature", http.StatusUnauthorized)
			return
		}
		token, _ := strconv.ParseInt(request.Header.Get("webhook-lease-token"), 10, 64)
		io.WriteString(response, accept(request.Header.Get("webhook-id"), token))
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
