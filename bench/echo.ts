import { createServer } from 'node:net'

/** The server of a raw TCP echo, as Node writes one. Started by bench.ts, which is told the port. */
const server = createServer({ noDelay: true }, (socket) => {
  socket.on('error', () => socket.destroy())
  socket.pipe(socket)
})
server.listen(0, '127.0.0.1', () => process.send?.(server.address()))
