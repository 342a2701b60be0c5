/** Where a test can stand between this library and the kernel: every call through the addon and node:fs passes here. */

let observer: ((call: string) => void) | undefined

/** Called with the call's name before it is made. For tests. */
export function observe(onCall: ((call: string) => void) | undefined): void {
  observer = onCall
}

export function observed<Values extends unknown[], Result>(
  name: string,
  call: (...values: Values) => Result,
): (...values: Values) => Result {
  return (...values) => {
    observer?.(name)
    return call(...values)
  }
}
