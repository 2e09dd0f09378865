// Ends with 0 while the service accepts steps.
const port = process.env.MUOND_PORT ?? '8787'
const response = await fetch(`http://127.0.0.1:${port}/readyz`)
if (!response.ok) throw new Error(`readyz answers ${response.status}: ${await response.text()}`)
