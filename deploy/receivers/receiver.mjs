import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const SECRET = Buffer.from(process.env.WEBHOOK_SECRET.replace(/^whsec_/, ""), "base64");
const TOLERANCE = 300; // seconds
const seen = new Map(); // event id -> highest token; a table with a unique key in a real receiver

function isSigned(headers, body) {
  const { "webhook-id": event, "webhook-timestamp": timestamp, "webhook-signature": given = "" } = headers;
  if (!/^\d+$/.test(timestamp) || Math.abs(Date.now() / 1000 - Number(timestamp)) > TOLERANCE) return false;
  const mac = createHmac("sha256", SECRET).update(`${event}.${timestamp}.`).update(body).digest("base64");
  const expected = Buffer.from(`v1,${mac}`);
  return given.split(" ").some((signature) => {
    const bytes = Buffer.from(signature);
    return bytes.length === expected.length && timingSafeEqual(bytes, expected);
  });
}

function accept(event, token) {
  const known = seen.get(event);
  seen.set(event, known > token ? known : token);
  if (known === undefined) return "new"; // do what the event says, in the transaction that writes its id
  return token > known ? "duplicate" : "late duplicate";
}

createServer(async (request, response) => {
  try {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    if (isSigned(request.headers, Buffer.concat(pieces))) {
      response.end(accept(request.headers["webhook-id"], BigInt(request.headers["webhook-lease-token"])));
    } else {
      response.writeHead(401).end("bad signature");
    }
  } catch {
    response.destroy(); // the request was broken off, as a worker does that loses its lease: it comes again
  }
}).listen(Number(process.env.PORT), "127.0.0.1");
